"""The data set's files: Parquet shards of each split, the rejected rows, the account, the data card."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from align.artifacts import write_json
from data.ingestion.decide import KEPT, Decisions
from data.ingestion.rules import ACROSS_ROWS
from data.ingestion.sift import Piece, Sifted
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
    kept: Counter[str] = field(default_factory=Counter[str])
    splits: Counter[str] = field(default_factory=Counter[str])
    first: str = ""  # the first rejected row: where, why

    def account(self, source: str) -> Account:
        rejected = self.rejected.get(source, Counter())
        return Account(self.kept[source] + rejected.total(), self.kept[source], tuple(sorted(rejected.items())))


def write_rows(
    folder: Path, kind: RecordKind, sifted: Sequence[Sifted], decisions: Decisions, on_progress: OnProgress
) -> Tally:
    """Piece by piece, in order: the kept rows into their split's shards, the others with their reason."""
    tally, start, before = Tally(), 0, 0
    rejects = pa.CompressedOutputStream(pa.OSFile(str(folder / REJECTS), "wb"), "zstd")
    with rejects, _Shards(folder, SCHEMAS[kind]) as shards:
        for number, one in enumerate(sifted):
            source = one.piece.source.name
            if one.piece.chunk.start == 0:
                before = 0
            rows = slice(start, start + one.kept)
            reasons, is_held_out = decisions.reason[rows], decisions.is_held_out[rows]
            kept = _read(one.piece.path("kept"))
            kept = kept.set_column(kept.schema.get_field_index("line"), "line", pc.add(kept["line"], before))
            for split, mask in zip(SPLITS, (~is_held_out, is_held_out), strict=True):
                own = kept.filter(pa.array(mask & (reasons == KEPT)))
                shards.write(split, own)
                tally.splits[split] += own.num_rows
                tally.kept[source] += own.num_rows
            counted = tally.rejected.setdefault(source, Counter())
            for reject in _rejected(one.piece, kept, reasons, before):
                counted[cast(str, reject["reason"])] += 1
                tally.first = tally.first or f"{source}:{reject['line']}: {reject['reason']} ({reject['detail']})"
                rejects.write(json.dumps({"source": source, **reject}, ensure_ascii=True).encode() + b"\n")
            start, before = rows.stop, before + one.rows
            on_progress("writing", number + 1, len(sifted))
    return tally


def _rejected(piece: Piece, kept: pa.Table, reasons: NDArray[np.int8], before: int) -> Iterator[dict[str, object]]:
    """By line: those rejected by themselves, and among others. The latter are read once more, to be given whole."""
    alone = _read(piece.path("rejected")).to_pylist()
    found = [{**reject, "line": reject["line"] + before} for reject in alone]
    lines = cast(list[int], kept["line"].to_pylist())
    among = {lines[n] - before: ACROSS_ROWS[reasons[n]] for n in np.flatnonzero(reasons != KEPT).tolist()}
    if among:
        rows = {raw.line: as_text(raw.content) for raw in raw_rows(piece.chunk) if raw.line in among}
        for n in np.flatnonzero(reasons != KEPT).tolist():
            own = {"reason": ACROSS_ROWS[reasons[n]], "field": "", "detail": "", "row": rows[lines[n] - before]}
            found.append({"line": lines[n], **own})
    return iter(sorted(found, key=lambda reject: cast(int, reject["line"])))


def write_words(folder: Path, tally: Tally, description: dict[str, object]) -> dict[str, object]:
    """account.json, dataset.json and datacard.md; returns the account as it stands in the file."""
    sources = {name: tally.account(name) for name in tally.rejected}
    whole = Account(0, 0, ())
    for own in sources.values():
        whole = whole + own
    account = {**_plain(whole), "sources": {name: _plain(own) for name, own in sources.items()}}
    write_json(folder / "account.json", account)
    description = {**description, "splits": {split: tally.splits[split] for split in SPLITS}}
    write_json(folder / "dataset.json", description)
    (folder / "datacard.md").write_text(_card(description, sources, whole), encoding="utf-8")
    return account


def _plain(account: Account) -> dict[str, object]:
    return {**asdict(account), "rejected": dict(account.rejected)}


def _card(description: dict[str, object], sources: dict[str, Account], whole: Account) -> str:
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
        f"Each rejected row stands whole in {REJECTS}. Made by `align ingest` with these settings:",
        "",
        *(f"- {key}: {json.dumps(value, ensure_ascii=False)}" for key, value in sorted(settings.items())),
    ]
    return "\n".join(lines) + "\n"


def _read(path: Path) -> pa.Table:
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_file(file).read_all()


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

    def __enter__(self) -> "_Shards":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for writer in self._writers.values():
            writer.close()
