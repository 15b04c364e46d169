"""One piece of a file: every row kept or rejected by itself, the kept ones as columns with their keys.

A pure function of the piece's bytes and the rules, whichever process or machine runs it.
"""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data.formats import parse_row, shorten
from data.ingestion.near import signatures
from data.ingestion.rules import IDENTICAL, TIE, RowRules, SourceFile
from data.ingestion.shapes import SHAPES
from data.ingestion.tables import REJECTS, SCHEMAS, table_of
from data.ingestion.tokens import TokenGate
from data.readers import CHUNK_BYTES, Chunk, Damage, RawRow, as_text, count_rows, decode, raw_rows
from data.records import Comparison, Record, Reject, UnfitError, Verdict, parts_of
from data.splits import normalize, normalized_prompt, prompt_key

# 8 bytes each: among 100 million rows, two different ones share a key with a probability of 3 in 10,000.
# `pair`: the same for A over B and B over A, or for both verdicts on one answer; `side` says which of them.
KEYS = np.dtype([("content", "<u8"), ("prompt", "<u8"), ("pair", "<u8"), ("side", "i1")])
_PREFIX = 48
_ROWS_HELD = 8192


@dataclass(frozen=True)
class Piece:
    """A chunk on its way: where it comes from, where its tables go."""

    number: int
    source: SourceFile
    chunk: Chunk
    folder: Path

    def path(self, what: str) -> Path:
        return self.folder / f"{self.number:06}.{what}"


@dataclass(frozen=True)
class Sifted:
    piece: Piece
    rows: int  # by how much the next chunk's line numbers are higher
    rows_in: int
    kept: int
    warnings: tuple[tuple[int, str], ...]  # (line, what the user must hear of before the account)


def with_lines_before(sifted: Sequence[Sifted]) -> Iterator[tuple[Sifted, int]]:
    """Each piece, in order, with how many lines of its file come before it."""
    before = 0
    for one in sifted:
        before = before if one.piece.chunk.start else 0
        yield one, before
        before += one.rows


def sift(piece: Piece, rules: RowRules) -> Sifted:
    """Write the piece's .kept and .rejected (Arrow), .keys and, if asked for, .near (numpy's bytes)."""
    gate = TokenGate(rules.tokens) if rules.tokens is not None else None
    warnings: list[tuple[int, str]] = []
    rows_in = 0
    with closing(_Tables(piece, rules)) as tables:
        for raw in raw_rows(piece.chunk):
            if isinstance(raw.content, Damage) and raw.content.ends_file:
                warnings.append((raw.line, raw.content.detail))
            text = None
            for found in _records(raw, piece.source, rules):
                rows_in += 1
                reject = found if isinstance(found, Reject) else _judge(found, rules, gate)
                if reject is None:
                    tables.keep(raw.line, cast(Record, found))
                else:  # the row whole once, though a tree of ranked answers may be rejected in many parts
                    text = as_text(raw.content) if text is None else ""
                    tables.reject(raw.line, reject, text)
        tables.flush()
    return Sifted(piece, count_rows(piece.chunk), rows_in, tables.num_kept, tuple(warnings))


class _Tables:
    """Owns the piece's files; holds no more than so many rows or characters, however large the piece is."""

    def __init__(self, piece: Piece, rules: RowRules) -> None:
        self._source, self._rules = piece.source.name, rules
        self._kept = _writer(piece.path("kept"), SCHEMAS[rules.kind])
        self._rejected = _writer(piece.path("rejected"), REJECTS)
        self._keys, self._near = piece.path("keys").open("wb"), piece.path("near").open("wb")
        self._lines: list[int] = []
        self._records: list[Record] = []
        self._rejects: list[dict[str, object]] = []
        self._characters = 0
        self.num_kept = 0

    def keep(self, line: int, record: Record) -> None:
        self._lines.append(line)
        self._records.append(record)
        turns, texts = parts_of(record)
        self._flush_if_full(sum(len(turn.content) for turn in turns) + sum(map(len, texts.values())))

    def reject(self, line: int, reject: Reject, text: str) -> None:
        why = {"reason": reject.reason, "field": reject.field, "detail": reject.detail}
        self._rejects.append({"line": line, **why, "row": text})
        self._flush_if_full(len(text))

    def _flush_if_full(self, num_characters: int) -> None:
        self._characters += num_characters
        if len(self._records) + len(self._rejects) >= _ROWS_HELD or self._characters >= CHUNK_BYTES:
            self.flush()

    def flush(self) -> None:
        hashes, keys = _keys(self._records, self._rules.seed)
        self._kept.write_table(table_of(self._rules.kind, self._records, self._lines, self._source, hashes))
        self._rejected.write_table(pa.Table.from_pylist(self._rejects, REJECTS))
        keys.tofile(self._keys)
        if self._rules.has_signatures:
            signatures(self._records).tofile(self._near)
        self.num_kept += len(self._records)
        self._lines, self._records, self._rejects, self._characters = [], [], [], 0

    def close(self) -> None:
        for file in (self._kept, self._rejected, self._keys, self._near):
            file.close()


def _records(raw: RawRow, source: SourceFile, rules: RowRules) -> Iterator[Record | Reject]:
    """What a raw row holds: one record as a rule, several of a tree of ranked answers."""
    row = decode(raw)
    if isinstance(row, Damage):
        yield Reject("", "malformed", "", shorten(row.detail))
        return
    if source.is_detected and not source.shape.matches(row):
        other = next((name for name, shape in SHAPES.items() if shape.matches(row)), None)
        if other is not None:
            detail = f"this row is {other}, the file {source.shape.name}; put such rows into a file of their own"
            yield Reject("", "another shape", "", shorten(detail))
            return
    try:
        rows = source.shape.convert(row)
    except UnfitError as unfit:
        yield unfit.reject("")
        return
    for canonical in rows:
        yield parse_row(canonical, "", rules.kind)


def _judge(record: Record, rules: RowRules, gate: TokenGate | None) -> Reject | None:
    if isinstance(record, Comparison):
        if record.preference == 0.5 and not rules.keep_ties:
            return Reject("", TIE, "preference", "both are as good; --keep-ties keeps them")
        if _are_equal_normalized(record.chosen, record.rejected):
            return Reject("", IDENTICAL, "rejected", shorten(record.rejected))
    return gate.reject(record) if gate is not None else None


def _are_equal_normalized(one: str, other: str) -> bool:
    if one.isascii() and other.isascii():  # then the beginnings decide, as a rule
        first, second = normalize(one[:_PREFIX]), normalize(other[:_PREFIX])
        shorter = min(len(first), len(second)) - 1
        if first[: max(shorter, 0)] != second[: max(shorter, 0)]:
            return False
    return normalize(one) == normalize(other)


def _keys(records: Sequence[Record], seed: int) -> tuple[list[str], NDArray[np.void]]:
    """(content hashes, KEYS) of the records. The pair's key is of normalised texts: a contradiction is one also if a
    space differs."""
    hashes: list[str] = []
    keys = np.zeros(len(records), KEYS)
    for number, record in enumerate(records):
        turns, texts = parts_of(record)
        sides, side = texts.values(), _side(record)
        content = blake2b(bytes([side + 1]), digest_size=16)
        for text in ("\x1e".join(f"{turn.role}\x1f{turn.content}" for turn in turns), *sides):
            content.update(_digest(text))
        prompt, digests = normalized_prompt(record), [_digest(normalize(text)) for text in sides]
        # Under other norms another answer may be the better one
        norms = _digest(normalize(turns[0].content)) if turns and turns[0].role == "system" else b""
        pair = blake2b(_digest(prompt) + norms + b"".join(sorted(digests)), digest_size=8).digest()
        if isinstance(record, Comparison) and digests[0] > digests[1]:
            side = -side
        hashes.append(content.hexdigest())
        keys[number] = (int.from_bytes(content.digest()[:8]), prompt_key(prompt, seed), int.from_bytes(pair), side)
    return hashes, keys


def _side(record: Record) -> int:
    """Which of two opposite statements it makes: 1 or −1, or 0 for neither."""
    if isinstance(record, Comparison):
        return int(np.sign(record.preference - 0.5))
    return (1 if record.is_good else -1) if isinstance(record, Verdict) else 0


def _digest(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=16).digest()


def _writer(path: Path, schema: pa.Schema) -> pa.RecordBatchFileWriter:
    return pa.ipc.new_file(str(path), schema, options=pa.ipc.IpcWriteOptions(compression="lz4"))
