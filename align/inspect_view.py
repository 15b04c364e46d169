"""What `align inspect` shows of a data set: on the terminal, as JSON, as a page of HTML."""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from align.artifacts import write_text
from align.errors import StorageError, UsageError
from align.show import make_table, printable
from data.ingestion.inspection import Example, Inspection, Share
from data.ingestion.parts import Part

_SHOWN = 600  # characters at either end of a part of an example


def inspection_view(found: Inspection) -> RenderableType:
    parts: list[RenderableType] = [_sources(found)]
    if found.contents.rejected:
        parts.append(_counts("rejected", "reason", found.contents.rejected.items()))
    if found.not_encodable:
        parts.append(_counts("no tokens", "reason", found.not_encodable.items()))
    parts.append(_lengths(found))
    parts.append(_facts(found))
    repeated = [(prompt.excerpt, prompt.rows) for prompt in found.prompts.most_frequent]
    if repeated:
        parts.append(_counts("most frequent prompts", "begins with", repeated))
    return Group(*parts, *(_example(example) for example in found.examples))


def write_page(path: Path, view: RenderableType) -> None:
    """One self-contained HTML file, whole or not at all. UsageError if it cannot be written."""
    console: Any = Console(record=True, width=140, file=io.StringIO())
    console.print(view)
    try:
        write_text(path, console.export_html())
    except StorageError as error:
        raise UsageError(f"--html: cannot write {path}: {error.__cause__}; choose another file") from None


def _sources(found: Inspection) -> Table:
    contents = found.contents
    title = f"{contents.kind}: {contents.rows_in:,} rows in, {contents.kept:,} kept"
    table = make_table(title, "source", "shape", "in", "kept", "rejected", *contents.splits, texts=2)
    for of in contents.sources:
        counts = (of.rows_in, of.kept, of.rejected, *of.splits.values())
        table.add_row(printable(of.name), printable(of.shape), *(f"{count:,}" for count in counts))
    rejected = sum(contents.rejected.values())
    counts = (contents.rows_in, contents.kept, rejected, *contents.splits.values())
    table.add_row("all", "", *(f"{count:,}" for count in counts), style="bold")
    return table


def _counts(title: str, what: str, counts: Iterable[tuple[str, int]]) -> Table:
    table = make_table(title, what, "rows")
    for name, count in counts:
        table.add_row(printable(name), f"{count:,}")
    return table


def _lengths(found: Inspection) -> Table:
    table = make_table("lengths (row: the prompt and its longest response)", "", "mean", "p50", "p95", "p99", "longest")
    for unit, by_part in found.lengths.items():
        for name, of in by_part.items():
            numbers = (of.p50, of.p95, of.p99, of.max)
            table.add_row(f"{name}, {unit}", f"{of.mean:,.1f}", *(f"{number:,}" for number in numbers))
    return table


def _facts(found: Inspection) -> Table:
    turns = ", ".join(f"{turns}: {rows:,}" for turns, rows in found.turns.items())
    facts: list[tuple[str, str]] = [
        ("rows by prompt turns", turns),
        ("with a system message", f"{found.with_system:,}"),
        ("distinct prompts", f"{found.prompts.distinct:,}"),
    ]
    for unit, share in found.length_bias.items():
        facts.append((f"the longer one preferred ({unit})", _share(share)))
    for label, share in (
        ("ties", found.ties),
        ("good", found.labels),
        (f"rows over {found.max_length} tokens", found.over_length),
    ):
        if share is not None:
            facts.append((label, _share(share)))
    if found.preferred_rejected:
        facts.append(("preference under 0.5", f"{found.preferred_rejected:,}"))
    if found.margins is not None:
        margins = found.margins
        facts.append(("margins", f"{margins.rows:,}: {margins.low:.3g} to {margins.high:.3g}, mean {margins.mean:.3g}"))
    grid = Table.grid(padding=(0, 2))
    for fact in facts:
        grid.add_row(*map(Text, fact))
    return grid


def _share(share: Share) -> str:
    if share.share is None or share.interval is None:
        return "of no rows"
    low, high = share.interval
    return f"{share.share:.3f} [{low:.3f}, {high:.3f}] ({share.count:,} of {share.total:,})"


def _example(example: Example) -> Table:
    grid = Table.grid(padding=(0, 1))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row("\nexample", printable(f"\n{example.split}, {example.source}"))
    if example.refusal is not None:
        grid.add_row("no tokens", printable(example.refusal))
    for part in example.parts:
        grid.add_row(part.name, _marked(part))
    return grid


def _marked(part: Part) -> Text:
    text = printable(part.text)  # character for character: the places of `trained` hold
    for start, stop in part.trained:
        text.stylize("green", start, stop)
    if len(text) <= 2 * _SHOWN:
        return text
    return Text.assemble(text[:_SHOWN], (f" … {len(text) - 2 * _SHOWN:,} characters … ", "dim"), text[-_SHOWN:])
