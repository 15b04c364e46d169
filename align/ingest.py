"""`align ingest`: from the command line's words to an ingestion, with an engine to run it, and its final table."""

import os
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, cast

from rich.console import RenderableType
from rich.table import Table

from align.base import load_codec
from align.cluster import map_on_cluster
from align.config import BaseModelConfig
from align.driver import Display
from align.errors import UsageError
from align.installation import import_root
from align.show import printable
from align.status import Status
from data.ingestion.find import Asked
from data.ingestion.rules import TokenRule
from data.ingestion.run import ingest, local_engine


@dataclass(frozen=True)
class IngestCall:
    """The options of the command, as they were given."""

    sources: tuple[str, ...]
    to: Path
    shape: str | None
    columns: str | None
    held_out: tuple[str, ...]
    weights: tuple[float, ...]
    near_threshold: float | None
    keep_ties: bool
    tokenizer: str | None
    max_length: int | None
    system_prompt: str | None
    seed: int
    engine: Literal["local", "ray"]
    address: str


def run_ingest(call: IngestCall, *, display: Display) -> tuple[dict[str, object], RenderableType]:
    """The account, and the table that shows it."""
    started = time.time()
    phase = ("", started)

    def on_progress(doing: str, done: int, total: int) -> None:
        nonlocal phase
        now = time.time()
        if phase[0] != doing:
            phase = (doing, now)
        display.progress(Status("ingest", doing, done, total, phase[1], now, {}))

    try:
        engine = local_engine(os.cpu_count() or 1)
        if call.engine == "ray":
            engine = partial(map_on_cluster, address=call.address, import_root=import_root())
        made = ingest(_asked(call), call.to, engine=engine, note=display.note, on_progress=on_progress)
    finally:
        display.close()
    return made.account, _view(made.account, seconds=time.time() - started)


def _asked(call: IngestCall) -> Asked:
    fraction, held_out = _held_out(call.held_out)
    return Asked(
        sources=call.sources,
        held_out=held_out,
        shape=call.shape,
        columns=tuple(_pairs(call.columns)) if call.columns else (),
        held_out_fraction=fraction,
        seed=call.seed,
        keep_ties=call.keep_ties,
        near_threshold=call.near_threshold,
        weights=call.weights,
        tokens=_token_rule(call),
    )


def _held_out(given: tuple[str, ...]) -> tuple[float, tuple[str, ...]]:
    if len(given) != 1:
        return 0.05, given
    try:
        fraction = float(given[0])
    except ValueError:
        return 0.05, given
    if not 0 <= fraction < 1:
        raise UsageError(f"--held-out {given[0]}: a fraction is from 0 to below 1; a source is a file's name")
    return fraction, ()


def _pairs(columns: str) -> list[tuple[str, str]]:
    pairs = [part.partition("=") for part in columns.split(",")]
    wrong = [ours for ours, is_there, theirs in pairs if not (ours and is_there and theirs)]
    if wrong:
        raise UsageError(f"--map {columns}: wanted is ours=theirs,ours=theirs and so on; see {wrong[0]!r}")
    return [(ours.strip(), theirs.strip()) for ours, _, theirs in pairs]


def _token_rule(call: IngestCall) -> TokenRule | None:
    if call.tokenizer is None and call.max_length is None:
        return None
    if call.tokenizer is None or call.max_length is None:
        raise UsageError("--tokenizer and --max-length go together: the one counts what the other limits")
    load = partial(load_codec, BaseModelConfig(model=call.tokenizer), system_prompt=call.system_prompt)
    load()  # a wrong name is told before anything is read
    return TokenRule(call.max_length, load, {"tokenizer": call.tokenizer, "system_prompt": call.system_prompt})


def _view(account: dict[str, object], *, seconds: float) -> RenderableType:
    table = Table(title=f"ingested in {seconds:.1f} s", title_justify="left")
    for heading in ("source", "rows in", "kept", "rejected", "because"):
        table.add_column(heading, justify="left" if heading in ("source", "because") else "right")
    sources = cast(dict[str, dict[str, object]], account["sources"])
    for name, own in (*sources.items(), *([("all", account)] if len(sources) > 1 else [])):
        rejected = cast(dict[str, int], own["rejected"])
        because = ", ".join(f"{reason} {count:,}" for reason, count in sorted(rejected.items(), key=lambda r: -r[1]))
        table.add_row(
            printable(name), f"{own['rows_in']:,}", f"{own['kept']:,}", f"{sum(rejected.values()):,}", because
        )
    return table
