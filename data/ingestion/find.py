"""What goes in: files and hub data sets, the shape that the rows of each are read as, the pieces they are cut into."""

import difflib
import glob
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import cast

from align.config import SourceConfig
from align.errors import DataError, UsageError
from data.formats import escape, shorten
from data.ingestion.flat import split_columns
from data.ingestion.rules import SourceFile, TokenRule
from data.ingestion.shapes import ROWS_LOOKED_AT, SHAPES, Row, Shape, detect, mapped
from data.ingestion.sift import Piece
from data.readers import Chunk, Damage, cut, decode, raw_rows
from data.records import RecordKind, UnfitError
from data.sources import is_dataset, load_hub

_HUB = "hub:"


@dataclass(frozen=True)
class IngestRequest:
    """What `align ingest` is asked for."""

    sources: tuple[str, ...]  # files, globs, or hub:NAME[:SPLIT]
    held_out: tuple[str, ...] = ()  # likewise; held out in place of a fraction
    shape: str | None = None  # none: found out from the first rows of each file
    columns: tuple[tuple[str, str], ...] = ()  # of --map: (ours, theirs)
    held_out_fraction: float = 0.05
    seed: int = 0
    keep_ties: bool = False
    near_threshold: float | None = None
    weights: tuple[float, ...] = ()
    tokens: TokenRule | None = None

    def check(self) -> None:
        """UsageError if the settings do not fit together."""
        if self.shape is not None and self.columns:
            raise UsageError("--format names a known shape, --map describes one: give one of them")
        if self.shape is not None and self.shape not in SHAPES:
            raise UsageError(f"--format {self.shape}: known are {', '.join(SHAPES)}")
        if self.weights and (
            len(self.weights) != len(self.sources) or not all(0 < weight < math.inf for weight in self.weights)
        ):
            given = ", ".join(f"{weight:g}" for weight in self.weights)
            raise UsageError(f"--weight: give one above 0 for each of the {len(self.sources)} sources, not {given}")
        if self.weights and self.held_out:
            raise UsageError("--weight draws shares of sources, and --held-out names sources that have none: give one")


def find_pieces(asked: IngestRequest, scratch: Path, note: Callable[[str], None]) -> list[Piece]:
    """In the order of the sources as given, of a glob's files by name."""
    asked.check()
    forced = SHAPES[asked.shape] if asked.shape else None
    if asked.columns:
        forced = mapped(dict(asked.columns))
    named = [(n, False, source) for n, source in enumerate(asked.sources)]
    named += [(len(asked.sources) + n, True, source) for n, source in enumerate(asked.held_out)]
    pieces: list[Piece] = []
    for number, is_held_out, source in named:
        for name, path in _files(source, scratch):
            chunks = cut(path.absolute())  # workers may have another current folder
            _verify_columns(name, chunks, dict(asked.columns))
            file = SourceFile(name, number, forced or _detect(name, chunks), is_held_out, is_detected=forced is None)
            if path.stat().st_size == 0:
                note(f"warning: {name} is empty")
            elif file.shape is _NO_SHAPE:
                note(f"warning: {name}: none of its first rows can be read")
            else:
                note(f"{name}: {file.shape.name}")
            pieces += [Piece(len(pieces) + n, file, chunk, scratch) for n, chunk in enumerate(chunks)]
    return pieces


def describe(asked: IngestRequest, kind: RecordKind, pieces: Sequence[Piece]) -> dict[str, object]:
    """What dataset.json says beside the numbers."""
    return {
        "kind": kind,
        "shapes": {piece.source.name: piece.source.shape.name for piece in pieces},
        "settings": {
            "held_out": list(asked.held_out) or asked.held_out_fraction,
            "seed": asked.seed,
            "keep_ties": asked.keep_ties,
            "near_threshold": asked.near_threshold,
            "weights": dict(zip(asked.sources, asked.weights, strict=False)),
            "map": dict(asked.columns),
            "tokens": _told(asked.tokens) if asked.tokens else None,
        },
    }


def _told(rule: TokenRule) -> dict[str, object]:
    return {"max_length": rule.max_length, "tokenizer": rule.tokenizer, "system_prompt": rule.system_prompt}


def _files(source: str, scratch: Path) -> list[tuple[str, Path]]:
    """(name, path) of each file that a source stands for."""
    if source.startswith(_HUB):
        hub, _, split = source.removeprefix(_HUB).partition(":")
        if not hub:
            raise UsageError(f"{source}: the data set's name is missing: hub:NAME or hub:NAME:SPLIT")
        path = scratch / f"{hub.replace('/', '-')}-{split or 'train'}.parquet"
        load_hub(SourceConfig(hub=hub, split=split or "train")).to_parquet(str(path))
        return [(source, path)]
    if is_dataset(Path(source)):
        raise DataError(f"{source} is a data set already; it can be ingested anew as {source}/'*.parquet'")
    if Path(source).exists() or not glob.has_magic(source):
        return [(escape(source), Path(source))]
    names = sorted(glob.glob(source, recursive=True))
    found = [(escape(name), Path(name)) for name in names if Path(name).is_file()]
    if not found:
        raise DataError(f"no file matches {source}")
    return found


def _first_rows(chunks: Sequence[Chunk]) -> list[Row]:
    decoded = (decode(raw) for chunk in chunks for raw in raw_rows(chunk))
    return list(islice((row for row in decoded if not isinstance(row, Damage)), ROWS_LOOKED_AT))


def _verify_columns(name: str, chunks: Sequence[Chunk], columns: Mapping[str, str]) -> None:
    """UsageError for a column of --map that none of the first rows has: what is optional would be left out unsaid."""
    rows = _first_rows(chunks) if columns else []
    found = dict.fromkeys(key for row in rows for key in row)
    for target, source in columns.items():
        unknown = [column for column in split_columns(source) if column not in found] if rows else []
        if unknown:
            near = difflib.get_close_matches(unknown[0], found, n=1)
            meant = f"did you mean {near[0]}?" if near else f"it has {', '.join(found)}"
            raise UsageError(f"--map {target}={source}: {name} has no column {unknown[0]}; {shorten(meant)}")


def _detect(name: str, chunks: Sequence[Chunk]) -> Shape:
    rows = _first_rows(chunks)
    return detect(rows, where=name) if rows else _NO_SHAPE


def _unfit(row: Row) -> list[dict[str, object]]:
    raise UnfitError("malformed", "", "the file's first rows are none that can be read")


# Of a file whose first rows cannot be read at all: what of it can be is no ground to guess on. The kind is a dummy's.
_NO_SHAPE = Shape("none", "comparison", "nothing that can be read", _unfit, {})


def common_kind(pieces: Sequence[Piece]) -> RecordKind:
    """DataError if there is more than one."""
    kinds = {
        piece.source.shape.kind: piece.source.name for piece in reversed(pieces) if piece.source.shape != _NO_SHAPE
    }
    if len(kinds) > 1:
        told = "; ".join(f"{name} holds {kind}s" for kind, name in kinds.items())
        raise DataError(f"a data set is of one kind: {told}. Ingest them into data sets of their own")
    return cast(RecordKind, next(iter(kinds), _NO_SHAPE.kind))
