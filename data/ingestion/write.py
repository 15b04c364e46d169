"""The data set's files: Parquet shards of each split, the rejected rows, the account, the data card."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from heapq import merge
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from align.artifacts import write_json
from align.errors import InvariantError
from align.statistics import wilson_interval
from data.ingestion.decide import KEPT, Decisions
from data.ingestion.rules import ACROSS_ROWS
from data.ingestion.sift import Piece, Sifted, with_lines_before
from data.ingestion.tables import SCHEMAS
from data.readers import as_text, raw_rows
from data.records import Account, RecordKind

SPLITS = ("train", "held_out")
REJECTS = "rejects.jsonl.zst"
SHARD_BYTES = 256 << 20
OnProgress = Callable[[str, int, int], None]  # (what is being done, so many, of so many)


@dataclass
class Tally:
    """What became of the rows: by source, and how many went where."""

    rejected: dict[str, Counter[str]] = field(default_factory=dict[str, Counter[str]])
    rows_in: Counter[str] = field(default_factory=Counter[str])  # as they were read, not as a sum of the others
    kept: Counter[str] = field(default_factory=Counter[str])
    splits: Counter[str] = field(default_factory=Counter[str])
    characters: Counter[str] = field(default_factory=Counter[str])  # in all kept rows, by column
    longer: Counter[str] = field(default_factory=Counter[str])  # pairs, by which of the responses is longer
    labels: Counter[str] = field(default_factory=Counter[str])
    first: str = ""  # the first rejected row: where, why

    def measure(self, rows: pa.Table) -> None:
        lengths = {
            name: pc.utf8_length(rows[name]).to_numpy()
            for name in ("chosen", "rejected", "completion", "text")
            if name in rows.schema.names and rows[name].null_count == 0
        }
        for name, own in lengths.items():
            self.characters[name] += int(own.sum())
        if "chosen" in lengths:
            difference = lengths["chosen"] - lengths["rejected"]
            self.longer.update({"chosen": int((difference > 0).sum()), "rejected": int((difference < 0).sum())})
        if "label" in rows.schema.names:
            self.labels.update({"good": int(rows["label"].to_numpy().sum()), "all": rows.num_rows})

    def account(self, source: str) -> Account:
        """InvariantError if a row was lost on the way."""
        rejected = self.rejected[source]
        if self.rows_in[source] != self.kept[source] + rejected.total():
            raise InvariantError(
                f"{source}: {self.rows_in[source]} rows in, but {self.kept[source]} kept and {rejected.total()} "
                "rejected; nothing was written. Please report it with the file."
            )
        return Account(self.rows_in[source], self.kept[source], tuple(sorted(rejected.items())))


def write_rows(
    folder: Path, kind: RecordKind, sifted: Sequence[Sifted], decisions: Decisions, on_progress: OnProgress
) -> Tally:
    """Piece by piece, in order: the kept rows into their split's shards, the others with their reason."""
    tally, start = Tally(), 0
    rejects = pa.CompressedOutputStream(pa.OSFile(str(folder / REJECTS), "wb"), "zstd")
    with rejects, closing(_Shards(folder, SCHEMAS[kind])) as shards:
        for number, (one, before) in enumerate(with_lines_before(sifted), start=1):
            source = one.piece.source.name
            tally.rows_in[source] += one.rows_in
            counted, among = tally.rejected.setdefault(source, Counter()), list[tuple[int, str]]()
            for batch in _batches(one.piece.path("kept")):
                rows = slice(start, start + batch.num_rows)
                reasons, is_held_out = decisions.reason[rows], decisions.is_held_out[rows]
                lines = batch["line"].to_numpy()
                for split, mask in zip(SPLITS, (~is_held_out, is_held_out), strict=True):
                    chosen = mask & (reasons == KEPT)
                    own = _with_lines(batch, lines + before, chosen)
                    shards.write(split, own)
                    tally.splits[split] += own.num_rows
                    tally.measure(own)
                tally.kept[source] += int((reasons == KEPT).sum())
                among += [(int(lines[n]), ACROSS_ROWS[reasons[n]]) for n in np.flatnonzero(reasons != KEPT)]
                start = rows.stop
            for reject in _rejected(one.piece, among):
                counted[cast(str, reject["reason"])] += 1
                reject = {**reject, "line": cast(int, reject["line"]) + before, "source": source}
                tally.first = tally.first or f"{source}:{reject['line']}: {reject['reason']} ({reject['detail']})"
                rejects.write(json.dumps(reject, ensure_ascii=True, sort_keys=True).encode() + b"\n")
            on_progress("writing", number, len(sifted))
    return tally


def _statistics(tally: Tally, rows: int) -> list[str]:
    lines = [f"- mean length of {name}: {count / rows:,.1f} characters" for name, count in tally.characters.items()]
    if tally.longer.total():
        chosen, total = tally.longer["chosen"], tally.longer.total()
        low, high = wilson_interval(chosen, total)
        lines.append(
            f"- the longer response is the chosen one: {chosen / total:.3f} [{low:.3f}, {high:.3f}] of {total:,}"
        )
    if tally.labels["all"]:
        lines.append(f"- good: {tally.labels['good']:,} of {tally.labels['all']:,}")
    return [*lines, "", "More, with token lengths: `align inspect`.", ""]


def _batches(path: Path) -> Iterator[pa.RecordBatch]:
    with pa.ipc.open_file(str(path)) as file:
        for number in range(file.num_record_batches):
            yield file.get_batch(number)


def _with_lines(batch: pa.RecordBatch, lines: NDArray[np.int64], chosen: NDArray[np.bool_]) -> pa.Table:
    table = pa.Table.from_batches([batch])
    place = table.schema.get_field_index("line")
    return table.set_column(place, "line", pa.array(lines)).filter(pa.array(chosen))


def _rejected(piece: Piece, among: Sequence[tuple[int, str]]) -> Iterator[dict[str, object]]:
    """By line: those rejected by themselves, and `among` others: these rows are read once more, to be given whole. Of
    a row that is rejected in several parts the first alone has it."""
    alone = (row for batch in _batches(piece.path("rejected")) for row in batch.to_pylist())
    last = 0
    for reject in merge(alone, _read_again(piece, among), key=lambda reject: cast(int, reject["line"])):
        yield {**reject, "row": ""} if reject["line"] == last else reject
        last = reject["line"]


def _read_again(piece: Piece, among: Sequence[tuple[int, str]]) -> Iterator[dict[str, object]]:
    rows, text = raw_rows(piece.chunk) if among else iter(()), ""
    raw = next(rows, None)
    for line, reason in among:
        while raw is not None and raw.line < line:
            raw = next(rows, None)
        text = as_text(raw.content) if raw is not None else ""
        yield {"line": line, "reason": reason, "field": "", "detail": "", "row": text}


def write_words(folder: Path, tally: Tally, description: dict[str, object]) -> dict[str, object]:
    """account.json, dataset.json and datacard.md; returns the account as it stands in the file."""
    sources = {name: tally.account(name) for name in tally.rejected}
    whole = sum(sources.values(), Account(0, 0, ()))
    account = {**_plain(whole), "sources": {name: _plain(own) for name, own in sources.items()}}
    write_json(folder / "account.json", account)
    description = {**description, "splits": {split: tally.splits[split] for split in SPLITS}}
    write_json(folder / "dataset.json", description)
    (folder / "datacard.md").write_text(_card(description, sources, whole, tally), encoding="utf-8")
    return account


def _plain(account: Account) -> dict[str, object]:
    return {"rows_in": account.rows_in, "kept": account.kept, "rejected": dict(account.rejected)}


def _card(description: dict[str, object], sources: dict[str, Account], whole: Account, tally: Tally) -> str:
    shapes, settings = (cast(dict[str, object], description[key]) for key in ("shapes", "settings"))
    splits = cast(dict[str, int], description["splits"])
    lines = [
        f"# A {description['kind']} data set",
        "",
        f"{whole.rows_in:,} rows in, {whole.kept:,} kept: {splits['train']:,} train, {splits['held_out']:,} held out.",
        "",
        "| source | shape | rows in | kept | rejected |",
        "| --- | --- | ---: | ---: | ---: |",
        *(f"| {n} | {shapes[n]} | {a.rows_in:,} | {a.kept:,} | {a.num_rejected:,} |" for n, a in sources.items()),
        "",
        "| rejected because | rows |",
        "| --- | ---: |",
        *(f"| {reason} | {count:,} |" for reason, count in whole.rejected),
        "",
        *_statistics(tally, whole.kept),
        f"Each rejected row stands whole in {REJECTS}. Made by `align ingest` with these settings:",
        "",
        *(f"- {key}: {json.dumps(value, ensure_ascii=False)}" for key, value in sorted(settings.items())),
    ]
    return "\n".join(lines) + "\n"


class _Shards:
    """Owns the Parquet file that each split is being written to; a full one is followed by the next."""

    def __init__(self, folder: Path, schema: pa.Schema) -> None:
        self._folder = folder
        self._schema = schema
        self._writers: dict[str, pq.ParquetWriter] = {}
        self._bytes: Counter[str] = Counter()
        self._numbers: Counter[str] = Counter()

    def write(self, split: str, table: pa.Table) -> None:
        if not table.num_rows:
            return
        if self._bytes[split] > SHARD_BYTES:
            self._writers.pop(split).close()
            self._bytes[split] = 0
        if split not in self._writers:
            path = self._folder / f"{split}-{self._numbers[split]:05}.parquet"
            self._writers[split] = pq.ParquetWriter(path, self._schema, compression="zstd")
            self._numbers[split] += 1
        self._writers[split].write_table(table)
        self._bytes[split] += table.nbytes

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()
