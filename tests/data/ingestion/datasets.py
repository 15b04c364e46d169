"""Verified data sets as `align ingest` writes them, made by hand."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from align.artifacts import write_directory

TURNS = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
COLUMNS: dict[str, list[tuple[str, Any]]] = {
    "comparison": [("prompt", TURNS), ("chosen", pa.string()), ("rejected", pa.string()),
                   ("margin", pa.float64()), ("preference", pa.float64())],
    "verdict": [("prompt", TURNS), ("completion", pa.string()), ("label", pa.bool_())],
    "demonstration": [("messages", TURNS), ("text", pa.string())],
    "prompt": [("prompt", TURNS)],
}  # fmt: skip
COMMON = [("source", pa.string()), ("line", pa.int64()), ("content_hash", pa.string())]
Rows = Sequence[Mapping[str, Any]]


def turns(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """User and assistant by turns."""
    roles = ["user", "assistant"] * len(contents)
    spoken = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return [*([{"role": "system", "content": system}] if system is not None else []), *spoken]


def write_dataset(
    path: Path, kind: str, *, train: Rows = (), held_out: Rows = (), shard_rows: int = 1000, rejected: int = 0
) -> Path:
    """Rows without a source are of "a.jsonl"; content hashes count up through train, then held_out."""
    rows = [{"source": "a.jsonl", "line": n, "content_hash": f"{n:032x}"} | dict(row)
            for n, row in enumerate([*train, *held_out], start=1)]  # fmt: skip
    splits = {"train": rows[: len(train)], "held_out": rows[len(train) :]}
    kept = Counter(row["source"] for row in rows) or Counter({"a.jsonl": 0})
    first = next(iter(kept))
    reasons = {"empty response": rejected} if rejected else {}
    counts = {
        name: {"rows_in": n + rejected * (name == first), "kept": n, "rejected": reasons if name == first else {}}
        for name, n in kept.items()
    }

    def fill(folder: Path) -> None:
        for split, its_rows in splits.items():
            for shard, start in enumerate(range(0, len(its_rows), shard_rows)):
                table = pa.Table.from_pylist(
                    its_rows[start : start + shard_rows], schema=pa.schema([*COLUMNS[kind], *COMMON])
                )
                pq.write_table(table, folder / f"{split}-{shard:05}.parquet")
        shapes = dict.fromkeys(kept, "prompt, chosen, rejected")
        sizes = {split: len(its_rows) for split, its_rows in splits.items()}
        _write(folder / "dataset.json", {"kind": kind, "shapes": shapes, "splits": sizes, "settings": {}})
        account = {"rows_in": len(rows) + rejected, "kept": len(rows), "rejected": reasons, "sources": counts}
        _write(folder / "account.json", account)
        (folder / "datacard.md").write_text("# a data set\n")

    write_directory(path, fill, kind="dataset", stage="ingest", step=0, base_identity="")
    return path


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))


def pair(chosen: str, rejected: str, prompt: str = "Why?", **more: object) -> dict[str, object]:
    return {"prompt": turns(prompt), "chosen": chosen, "rejected": rejected, **more}
