"""Raw rows out of files of any kind that we know, in pieces that can be read apart: the same rows whoever reads them.

A row is numbered by its line (JSON lines, delimited text) or its place (a JSON array, Parquet), from 1. What cannot be
read is a `Damage` in its place, and the rest is still read; blank lines are no rows.
"""

import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader, TextIOWrapper
from pathlib import Path
from typing import IO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from align.errors import DataError

Row = Mapping[str, object]

KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
COMPRESSIONS = ("", ".gz", ".zst")
CHUNK_BYTES = 4 << 20
_BOM = b"\xef\xbb\xbf"
_BETWEEN_ELEMENTS = re.compile(r"[ \t\r\n,]*")
_PIECE = 1 << 20  # characters of a JSON array read at a time


@dataclass(frozen=True)
class Chunk:
    """A piece of a file: bytes `start` to `end` of JSON lines (the lines that begin there), row groups of Parquet;
    anything else is one piece."""

    path: Path
    start: int
    end: int


@dataclass(frozen=True)
class Damage:
    """What stands where a row should; `detail` says what was seen."""

    detail: str
    ends_file: bool = False  # nothing after it can be read


@dataclass(frozen=True)
class RawRow:
    line: int  # within the chunk, from 1
    content: bytes | Row | Damage  # bytes: a line that is not decoded yet


def kind_of_file(path: Path) -> str:
    """Its kind, without the compression: ".jsonl". DataError if it is none that we know."""
    name = path.name.lower()
    for compression in COMPRESSIONS:
        for kind in KINDS:
            if name.endswith(kind + compression) and not (kind == ".parquet" and compression):
                return kind
    raise DataError(
        f"{path}: unknown kind of file; known are {', '.join(KINDS)}, all but .parquet also with .gz or .zst"
    )


def require_file(path: Path) -> Path:
    """DataError if there is none."""
    if not path.is_file():
        is_folder = path.is_dir()
        reason = "it is a folder, and no data set of align ingest" if is_folder else "it does not exist"
        raise DataError(f"no data file {path}: {reason}")
    return path


def cut(path: Path, chunk_bytes: int = CHUNK_BYTES) -> list[Chunk]:
    """The file's chunks, in order. DataError if it is missing, of no known kind, or no Parquet file."""
    require_file(path)
    kind = kind_of_file(path)
    size = path.stat().st_size
    if kind == ".parquet":
        return [Chunk(path, start, end) for start, end in _row_groups(path, chunk_bytes)]
    if kind in (".jsonl", ".ndjson") and not _is_compressed(path):
        return [Chunk(path, start, min(start + chunk_bytes, size)) for start in range(0, size, chunk_bytes)]
    return [Chunk(path, 0, size)]


def raw_rows(chunk: Chunk) -> Iterator[RawRow]:
    kind = kind_of_file(chunk.path)
    if kind == ".parquet":
        return _parquet_rows(chunk)
    if kind in (".csv", ".tsv"):
        return _delimited_rows(chunk.path, "\t" if kind == ".tsv" else ",")
    if kind == ".json" and _is_array(chunk.path):
        return _array_rows(chunk.path)
    return _lines(chunk)


def decode(raw: RawRow) -> Row | Damage:
    """The row that a line holds: a JSON object in UTF-8."""
    if not isinstance(raw.content, bytes):
        return raw.content
    try:
        row: object = json.loads(raw.content.decode())  # of bytes, json would take UTF-16, too
    except (ValueError, RecursionError) as error:  # ValueError covers JSON, UTF-8 and over-long integers
        return Damage(f"{error}: {raw.content[:40]!r}")
    return cast(Row, row) if isinstance(row, dict) else Damage(f"no object: {raw.content[:40]!r}")


def as_text(content: bytes | Row | Damage) -> str:
    """The row whole, as it is kept beside the reason for its rejection; what is no UTF-8 as escapes."""
    if isinstance(content, bytes):
        return content.decode("utf-8", errors="backslashreplace")
    text = content.detail if isinstance(content, Damage) else json.dumps(content, ensure_ascii=False, default=str)
    return text.encode("utf-8", errors="backslashreplace").decode()


def count_rows(chunk: Chunk) -> int:
    """By how much the numbers of the next chunk's rows are higher than its own; 0 if its file is one chunk only."""
    kind = kind_of_file(chunk.path)
    if kind == ".parquet":
        with pq.ParquetFile(chunk.path) as file:
            return sum(file.metadata.row_group(n).num_rows for n in range(chunk.start, chunk.end))
    if kind == ".json" or _is_compressed(chunk.path) or kind in (".csv", ".tsv"):
        return 0
    with _open_at(chunk) as file:
        start, lines = file.tell(), 0
        while start < chunk.end and (line := file.readline()):
            start, lines = start + len(line), lines + 1
        return lines


def _is_compressed(path: Path) -> bool:
    return path.name.lower().endswith((".gz", ".zst"))


def _open(path: Path) -> IO[bytes]:
    if path.name.lower().endswith(".gz"):
        return cast(IO[bytes], gzip.open(path))
    if path.name.lower().endswith(".zst"):
        return cast(IO[bytes], BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path), "rb"), "zstd")))  # pyright: ignore[reportArgumentType]
    return path.open("rb")


def _open_at(chunk: Chunk) -> IO[bytes]:
    """At the first line that begins in the chunk: one that begins before it belongs to the chunk before."""
    file = _open(chunk.path)
    if chunk.start:
        file.seek(chunk.start - 1)
        file.readline()
    return file


def _lines(chunk: Chunk) -> Iterator[RawRow]:
    number = 0
    is_whole = _is_compressed(chunk.path) or kind_of_file(chunk.path) == ".json"
    try:
        with _open_at(chunk) as file:
            start = 0 if is_whole else file.tell()
            while (is_whole or start < chunk.end) and (line := file.readline()):
                start, number = start + len(line), number + 1
                content = line.removeprefix(_BOM) if number == 1 and chunk.start == 0 else line
                if content.strip():
                    yield RawRow(number, content.rstrip(b"\r\n"))
    except (EOFError, OSError, zlib.error, pa.ArrowException) as error:
        yield RawRow(number + 1, Damage(f"the file is damaged or cut short here: {error}", ends_file=True))


def _delimited_rows(path: Path, delimiter: str) -> Iterator[RawRow]:
    line = 0
    try:
        # What is no UTF-8 becomes lone surrogates, which the check of every text finds and names
        with TextIOWrapper(_open(path), encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
            rows = csv.reader(text, delimiter=delimiter)
            header = next(rows, None)
            line = rows.line_num
            for values in rows:
                first, line = line + 1, rows.line_num
                if values:
                    yield RawRow(first, _row_of(header or [], values))
    except (EOFError, OSError, zlib.error, csv.Error, pa.ArrowException) as error:
        yield RawRow(line + 1, Damage(f"the file is damaged or cut short here: {error}", ends_file=True))


def _row_of(header: Sequence[str], values: Sequence[str]) -> Row | Damage:
    if len(values) != len(header):
        return Damage(f"{len(values)} fields, where the header has {len(header)}: {','.join(values)}")
    return dict(zip(header, values, strict=True))


def _is_array(path: Path) -> bool:
    try:
        with _open(path) as file:
            return file.read(64).removeprefix(_BOM).lstrip()[:1] == b"["
    except (EOFError, OSError, zlib.error, pa.ArrowException):
        return False  # reading its lines says what is wrong


def _array_rows(path: Path) -> Iterator[RawRow]:
    """The elements of a JSON array, one at a time: the file may be larger than memory. Nothing after a mistake in it
    can be read."""
    decoder, number, at = json.JSONDecoder(), 0, 0
    try:
        with TextIOWrapper(_open(path), encoding="utf-8-sig") as text:
            buffer = text.read(_PIECE).lstrip()[1:]
            while True:
                at = cast(re.Match[str], _BETWEEN_ELEMENTS.match(buffer, at)).end()
                if buffer.startswith("]", at):
                    return
                try:
                    element, at = cast(tuple[object, int], decoder.raw_decode(buffer, at))
                except ValueError:
                    piece = text.read(max(_PIECE, len(buffer)))  # twice as much each time: parsed again, but not often
                    if not piece:
                        raise
                    buffer, at = buffer[at:] + piece, 0
                    continue
                number += 1
                is_row = isinstance(element, dict)
                yield RawRow(number, cast(Row, element) if is_row else Damage(f"no object: {element!r}"))
    except (ValueError, RecursionError, EOFError, OSError, zlib.error, pa.ArrowException) as error:
        yield RawRow(
            number + 1, Damage(f"the array cannot be read from its element {number + 1} on: {error}", ends_file=True)
        )


def _row_groups(path: Path, chunk_bytes: int) -> list[tuple[int, int]]:
    try:
        with pq.ParquetFile(path) as file:
            sizes = [file.metadata.row_group(n).total_byte_size for n in range(file.num_row_groups)]
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: names that are no UTF-8
        raise DataError(f"{path} is no Parquet file, or is damaged: {error}") from None
    borders, filled = [0], 0
    for number, size in enumerate(sizes):
        if filled and filled + size > chunk_bytes:
            borders.append(number)
            filled = 0
        filled += size
    return list(zip(borders, [*borders[1:], len(sizes)], strict=True)) if sizes else []


def _parquet_rows(chunk: Chunk) -> Iterator[RawRow]:
    number = 0
    try:
        with pq.ParquetFile(chunk.path) as file:
            for batch in file.iter_batches(batch_size=1024, row_groups=[*range(chunk.start, chunk.end)]):
                for row in cast(list[Row], batch.to_pylist()):
                    number += 1
                    yield RawRow(number, row)
    except (pa.ArrowException, OSError, ValueError) as error:
        yield RawRow(number + 1, Damage(f"the file is damaged here: {error}", ends_file=True))
