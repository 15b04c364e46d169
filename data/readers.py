"""Raw rows out of files of any kind that we know, in pieces that can be read apart: the same rows whoever reads them.

A row is numbered by its line (JSON lines, delimited text) or its place (a JSON array, Parquet), from 1. What cannot be
read is a `Damage` in its place, and the rest is still read; blank lines are no rows.
"""

import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BufferedReader, TextIOWrapper
from pathlib import Path
from typing import IO, Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from align.errors import DataError
from data.formats import Row, escape

KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
COMPRESSIONS = ("", ".gz", ".zst")
CHUNK_BYTES = 4 << 20
_BOM = b"\xef\xbb\xbf"
_BETWEEN_ELEMENTS = re.compile(r"[ \t\r\n,]*")
_PIECE = 1 << 20  # characters of a JSON array read at a time
_LONGEST = 256 << 20  # characters of one element: past it, a mistake is likelier than so long a row
_UNREADABLE = (EOFError, OSError, zlib.error, csv.Error, pa.ArrowException, ValueError, RecursionError)


@dataclass(frozen=True)
class Chunk:
    """A piece of a file: bytes `start` to `end` of plain JSON lines (the lines that begin there), row groups of
    Parquet; any other file is one piece."""

    path: Path
    start: int
    end: int


@dataclass(frozen=True)
class Damage:
    """What stands where a row should; `detail` says what was seen."""

    detail: str
    row: str = ""  # whole, if there is anything
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
    """DataError if there is none, or none that may be read."""
    try:
        with path.open("rb"):
            return path
    except IsADirectoryError:
        files = sorted(file.suffix for file in path.iterdir() if file.suffix in KINDS)
        reason = "it is a folder, and no data set of align ingest; " + (
            f"align ingest '{path}/*{files[0]}' --to FOLDER makes one of its files" if files else "name a file"
        )
    except FileNotFoundError:
        reason = "it does not exist"
    except OSError as error:
        reason = f"it cannot be read: {error.strerror}"
    raise DataError(f"no data file {path}: {reason}")


def cut(path: Path, chunk_bytes: int = CHUNK_BYTES) -> list[Chunk]:
    """The file's chunks, in order; one at least. DataError if it cannot be read, or is of no known kind."""
    kind = kind_of_file(require_file(path))
    if kind == ".parquet":
        return [Chunk(path, start, end) for start, end in _row_groups(path, chunk_bytes)]
    size = path.stat().st_size
    if not _has_chunks(path):
        return [Chunk(path, 0, size)]
    return [Chunk(path, start, min(start + chunk_bytes, size)) for start in range(0, max(size, 1), chunk_bytes)]


def raw_rows(chunk: Chunk) -> Iterator[RawRow]:
    """Where reading fails, a last row says so."""
    kind, last = kind_of_file(chunk.path), 0
    if kind == ".parquet":
        rows = _parquet_rows(chunk)
    elif kind in (".csv", ".tsv"):
        rows = _delimited_rows(chunk.path, "\t" if kind == ".tsv" else ",")
    else:
        rows = _array_rows(chunk.path) if kind == ".json" and _is_array(chunk.path) else _line_rows(chunk)
    try:
        for raw in rows:
            last = raw.line
            yield raw
    except _UNREADABLE as error:
        detail = f"the file is damaged or cut short, and cannot be read from here on: {error}"
        yield RawRow(last + 1, Damage(detail, ends_file=True))


def decode(raw: RawRow) -> Row | Damage:
    """The row that a line holds: a JSON object in UTF-8."""
    if not isinstance(raw.content, bytes):
        return raw.content
    try:
        row: object = json.loads(raw.content.decode())  # of bytes, json would take UTF-16, too
    except UnicodeDecodeError as error:
        return Damage(f"not UTF-8 from byte {error.start} of the row on; save the file as UTF-8")
    except (ValueError, RecursionError) as error:  # ValueError covers JSON, UTF-8 and over-long integers
        return Damage(f"{error}: {raw.content[:40]!r}")
    return cast(Row, row) if isinstance(row, dict) else Damage(f"no object: {raw.content[:40]!r}")


def as_text(content: bytes | Row | Damage) -> str:
    """The row whole, as it is kept beside the reason for its rejection; what is no UTF-8 as escapes."""
    if isinstance(content, bytes):
        return content.decode("utf-8", errors="backslashreplace")
    if isinstance(content, Damage):
        return escape(content.row)
    try:
        return escape(json.dumps(content, ensure_ascii=False, default=str))
    except RecursionError:  # read further up the stack than it is written
        return "a deeply nested row"


def count_rows(chunk: Chunk) -> int:
    """By how much the numbers of the next chunk's rows are higher than its own; 0 if its file is one chunk only."""
    if kind_of_file(chunk.path) == ".parquet":
        with pq.ParquetFile(chunk.path) as file:
            return sum(file.metadata.row_group(n).num_rows for n in range(chunk.start, chunk.end))
    return sum(1 for _ in _lines(chunk)) if _has_chunks(chunk.path) else 0


def _has_chunks(path: Path) -> bool:
    return path.name.lower().endswith((".jsonl", ".ndjson"))


def _open(path: Path) -> IO[bytes]:
    if path.name.lower().endswith(".gz"):
        return cast(IO[bytes], gzip.open(path))
    if path.name.lower().endswith(".zst"):
        stream: Any = pa.CompressedInputStream(pa.OSFile(str(path), "rb"), "zstd")
        return cast(IO[bytes], BufferedReader(stream))
    return path.open("rb")


def _lines(chunk: Chunk) -> Iterator[bytes]:
    """Those that begin in the chunk: one that begins before it belongs to the chunk before."""
    with _open(chunk.path) as file:
        at = max(chunk.start - 1, 0)
        if chunk.start:
            file.seek(at)
            at += len(file.readline())
        is_whole = not _has_chunks(chunk.path)  # `end` is then of the compressed bytes
        while (is_whole or at < chunk.end) and (line := file.readline()):
            at += len(line)
            yield line


def _line_rows(chunk: Chunk) -> Iterator[RawRow]:
    for number, line in enumerate(_lines(chunk), start=1):
        content = line.removeprefix(_BOM) if number == 1 and chunk.start == 0 else line
        if content.strip():
            yield RawRow(number, content.rstrip(b"\r\n"))


def _as_text_file(path: Path) -> TextIOWrapper:
    """What is no UTF-8 becomes lone surrogates, which the check of every text finds and names."""
    return TextIOWrapper(_open(path), encoding="utf-8-sig", errors="surrogateescape", newline="")


def _delimited_rows(path: Path, delimiter: str) -> Iterator[RawRow]:
    csv.field_size_limit(_LONGEST)
    with _as_text_file(path) as text:
        rows = csv.reader(text, delimiter=delimiter, strict=True)  # or a stray quote would swallow rows
        header = next(rows, None) or []
        repeated = {name for name in header if header.count(name) > 1}
        if repeated:
            raise ValueError(f"the header names {', '.join(sorted(repeated))} more than once")
        values: list[str] | None = []
        while values is not None:
            first = rows.line_num + 1
            try:
                values = next(rows, None)
            except csv.Error as error:
                if "end of data" in str(error):
                    raise ValueError(f"the quote that opens in line {first} is never closed") from None
                yield RawRow(first, Damage(f"a quote that does not fit: {error}; a quote in quotes is written twice"))
                continue
            if values:
                yield RawRow(first, _row_of(header, values))


def _row_of(header: Sequence[str], values: Sequence[str]) -> Row | Damage:
    if len(values) != len(header):
        return Damage(f"{len(values)} fields, where the header has {len(header)}", row=json.dumps(values))
    return dict(zip(header, values, strict=True))


def _is_array(path: Path) -> bool:
    try:
        with _open(path) as file:
            return file.read(4096).removeprefix(_BOM).lstrip()[:1] == b"["
    except _UNREADABLE:
        return False  # reading its lines says what is wrong


def _array_rows(path: Path) -> Iterator[RawRow]:
    """The elements of a JSON array, one at a time: the file may be larger than memory. Nothing after a mistake in it
    can be read."""
    decoder, number, at = json.JSONDecoder(), 0, 0
    with _as_text_file(path) as text:
        buffer, is_more = text.read(_PIECE).lstrip()[1:], True
        while True:
            at = cast(re.Match[str], _BETWEEN_ELEMENTS.match(buffer, at)).end()
            if buffer.startswith("]", at):
                if (buffer[at + 1 :] + text.read(_PIECE)).strip():
                    raise ValueError("there is more after the array's end")
                return
            element, end = None, len(buffer)
            try:
                element, end = cast(tuple[object, int], decoder.raw_decode(buffer, at))
            except ValueError:
                if not is_more or len(buffer) - at > _LONGEST:
                    raise
            if end == len(buffer) and is_more:  # it may go on; twice as much each time: parsed again, but not often
                piece = text.read(max(_PIECE, len(buffer) - at))
                buffer, at, is_more = buffer[at:] + piece, 0, bool(piece)
                continue
            number, at = number + 1, end
            is_row = isinstance(element, dict)
            yield RawRow(number, cast(Row, element) if is_row else Damage("no object", row=json.dumps(element)))


def _row_groups(path: Path, chunk_bytes: int) -> list[tuple[int, int]]:
    try:
        with pq.ParquetFile(path) as file:
            sizes = [file.metadata.row_group(n).total_byte_size for n in range(file.num_row_groups)]
    except _UNREADABLE as error:
        raise DataError(f"{path} is no Parquet file, or is damaged: {error}") from None
    borders, filled = [0], 0
    for number, size in enumerate(sizes):
        if filled and filled + size > chunk_bytes:
            borders.append(number)
            filled = 0
        filled += size
    return list(zip(borders, [*borders[1:], len(sizes)], strict=True))


def _parquet_rows(chunk: Chunk) -> Iterator[RawRow]:
    """The footer says how many rows there are, so each that cannot be read stands for itself."""
    number = 0
    with pq.ParquetFile(chunk.path) as file:
        for group in range(chunk.start, chunk.end):
            end = number + file.metadata.row_group(group).num_rows
            try:
                for batch in file.iter_batches(batch_size=1024, row_groups=[group]):
                    for row in _rows_of_batch(batch):
                        number += 1
                        yield RawRow(number, row)
            except _UNREADABLE as error:
                for line in range(number + 1, end + 1):
                    yield RawRow(line, Damage(f"row group {group} is damaged: {error}"))
            number = end


def _rows_of_batch(batch: pa.RecordBatch) -> Iterator[Row | Damage]:
    try:
        yield from cast(list[Row], batch.to_pylist())
    except (ValueError, OverflowError):  # a text that is no UTF-8, a date that Python has not
        for index in range(batch.num_rows):
            try:
                yield cast(Row, batch.slice(index, 1).to_pylist()[0])
            except (ValueError, OverflowError) as error:
                yield Damage(str(error))
