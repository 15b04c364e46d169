"""`align ingest`: from the command line's words to an ingestion, with an engine to run it, and its final table."""

import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal, cast

from rich.console import RenderableType

from align.base import load_codec
from align.config import BaseModelConfig
from align.errors import ModelError, TerminatedError, UsageError
from align.fan_out import map_on_cluster
from align.installation import import_root
from align.show import Display, make_table, printable
from align.status import Status
from align.stopping import heard_signals
from data.ingestion.find import IngestRequest
from data.ingestion.rules import TokenRule
from data.ingestion.run import ingest, local_engine
from data.tokenization import Codec


def run_ingest(
    asked: IngestRequest, to: Path, *, engine: Literal["local", "ray"], address: str, display: Display
) -> tuple[dict[str, object], RenderableType]:
    """The account, and the table that shows it. `address` is of the Ray cluster."""
    started = time.time()
    phase = ("", started)

    def on_progress(doing: str, done: int, total: int) -> None:
        nonlocal phase
        now = time.time()
        if phase[0] != doing:
            phase = (doing, now)
        display.progress(Status("ingest", doing, done, total, phase[1], now, {}))

    on_cluster = partial(map_on_cluster, address=address, import_root=import_root())
    own = on_cluster if engine == "ray" else local_engine(os.cpu_count() or 1)
    try:
        with heard_signals():  # or processes that read would be left behind
            account = ingest(asked, to, engine=own, note=display.note, on_progress=on_progress)
    except SystemExit:
        raise TerminatedError("terminated; nothing was written") from None
    return account, _view(account, seconds=time.time() - started)


def as_held_out(given: Sequence[str]) -> tuple[float, tuple[str, ...]]:
    """(fraction, sources) of --held-out: a lone number is a fraction."""
    fraction = float(given[0]) if len(given) == 1 and _is_number(given[0]) else None
    if fraction is None:
        number = next((text for text in given if _is_number(text)), None)
        if number is not None:
            raise UsageError(
                f"--held-out {' --held-out '.join(given)}: give one fraction, or sources, not {number} too"
            )
        return 0.05, tuple(given)
    if not 0 <= fraction < 1:
        raise UsageError(f"--held-out {given[0]}: a fraction is from 0 to below 1; a source is a file's name")
    return fraction, ()


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def as_columns(columns: str | None) -> tuple[tuple[str, str], ...]:
    """(ours, theirs) of --map."""
    pairs = [part.partition("=") for part in columns.split(",")] if columns is not None else []
    named = [ours.strip() for ours, _, _ in pairs]
    twice = next((ours for ours in named if named.count(ours) > 1), None)
    if twice:
        raise UsageError(f"--map {columns}: {twice} stands twice; a prompt of several columns is prompt=a+b")
    wrong = [ours for ours, is_there, theirs in pairs if not (ours and is_there and theirs)]
    if wrong:
        raise UsageError(f"--map {columns}: wanted is ours=theirs,ours=theirs and so on; see {wrong[0]!r}")
    return tuple((ours.strip(), theirs.strip()) for ours, _, theirs in pairs)


def as_token_rule(tokenizer: str | None, max_length: int | None, system_prompt: str | None) -> TokenRule | None:
    if tokenizer is None and max_length is None:
        if system_prompt is not None:
            raise UsageError("--system-prompt is about tokens: give --tokenizer and --max-length, too")
        return None
    if tokenizer is None or max_length is None:
        raise UsageError("--tokenizer and --max-length go together: the one counts what the other limits")
    load_named_codec(tokenizer, system_prompt)  # a wrong name is told before anything is read
    return TokenRule(max_length, tokenizer, system_prompt, load_named_codec)


def load_named_codec(tokenizer: str, system_prompt: str | None) -> Codec:
    """Of --tokenizer. ModelError if there is none."""
    try:
        return load_codec(BaseModelConfig(model=tokenizer), system_prompt=system_prompt)
    except ModelError as error:
        raise ModelError(f"--tokenizer: {str(error).removeprefix('base.model: ')}") from None


def _view(account: dict[str, object], *, seconds: float) -> RenderableType:
    table = make_table(f"ingested in {seconds:.1f} s", "source", "rows in", "kept", "rejected")
    table.add_column("because")
    sources = cast(dict[str, dict[str, object]], account["sources"])
    for name, own in (*sources.items(), *([("all", account)] if len(sources) > 1 else [])):
        rejected = cast(dict[str, int], own["rejected"])
        because = ", ".join(f"{reason} {count:,}" for reason, count in sorted(rejected.items(), key=lambda r: -r[1]))
        table.add_row(
            printable(name), f"{own['rows_in']:,}", f"{own['kept']:,}", f"{sum(rejected.values()):,}", because
        )
    return table
