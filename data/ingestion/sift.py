"""One piece of a file: every row kept or rejected by itself, the kept ones as columns with their keys.

A pure function of the piece's bytes and the rules, whichever process or machine runs it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data.formats import UnfitError, parse_row, shorten
from data.ingestion.near import signatures
from data.ingestion.rules import IDENTICAL, TIE, RowRules, SourceFile
from data.ingestion.tables import rejects_table, table_of
from data.ingestion.tokens import TokenGate
from data.readers import Chunk, Damage, RawRow, as_text, count_rows, decode, raw_rows
from data.records import Comparison, Demonstration, Message, PlainText, Prompt, Record, Reject, Verdict
from data.splits import normalize, normalized_prompt, prompt_key

# 8 bytes each: among 100 million rows, two different ones share a key with a probability of 3 in 10,000.
# `pair`: the same for A over B and B over A, or for both verdicts on one answer; `side` says which of them.
KEYS = np.dtype([("content", "<u8"), ("prompt", "<u8"), ("pair", "<u8"), ("side", "i1")])
_PREFIX = 48


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
    kept: int
    warnings: tuple[str, ...]  # what the user must hear of before the account


def sift(piece: Piece, rules: RowRules) -> Sifted:
    """Write the piece's .kept and .rejected (Arrow), .keys and, if asked for, .near (numpy)."""
    gate = TokenGate(rules.tokens) if rules.tokens is not None else None
    records: list[Record] = []
    lines: list[int] = []
    rejects: list[tuple[int, Reject, str]] = []
    warnings: list[str] = []
    for raw in raw_rows(piece.chunk):
        if isinstance(raw.content, Damage) and raw.content.ends_file:
            warnings.append(f"{piece.source.name}:{raw.line}: {raw.content.detail}")
        for found in _records(raw, piece.source, rules):
            reject = found if isinstance(found, Reject) else _judge(found, rules, gate)
            if reject is not None:
                rejects.append((raw.line, reject, as_text(raw.content)))
            else:
                records.append(cast(Record, found))
                lines.append(raw.line)
    hashes, keys = _keys(records, rules.seed)
    _write(table_of(rules.kind, records, lines, piece.source.name, hashes), piece.path("kept"))
    _write(rejects_table(rejects), piece.path("rejected"))
    np.save(piece.path("keys.npy"), keys)
    if rules.has_signatures:
        np.save(piece.path("near.npy"), signatures(records))
    return Sifted(piece, count_rows(piece.chunk), len(records), tuple(warnings))


def _records(raw: RawRow, source: SourceFile, rules: RowRules) -> Iterator[Record | Reject]:
    """What a raw row holds: one record as a rule, several of a tree of ranked answers."""
    row = decode(raw)
    if isinstance(row, Damage):
        yield Reject("", "malformed", "", shorten(row.detail))
        return
    try:
        rows = source.shape.convert(row)
    except UnfitError as unfit:
        yield Reject("", unfit.reason, unfit.field, unfit.detail)
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
    """(content hashes, KEYS) of the records."""
    hashes: list[str] = []
    keys = np.zeros(len(records), KEYS)
    for number, record in enumerate(records):
        turns, sides, side = _parts(record)
        prompt = _digest("\x1e".join(f"{turn.role}\x1f{turn.content}" for turn in turns))
        digests = [_digest(text) for text in sides]
        content = blake2b(prompt + b"".join(digests) + bytes([side + 1]), digest_size=16)
        pair = blake2b(prompt + b"".join(sorted(digests)), digest_size=8).digest()
        if isinstance(record, Comparison) and digests[0] > digests[1]:
            side = -side
        hashes.append(content.hexdigest())
        key = prompt_key(normalized_prompt(record), seed)
        keys[number] = (int.from_bytes(content.digest()[:8]), key, int.from_bytes(pair), side)
    return hashes, keys


def _parts(record: Record) -> tuple[Sequence[Message], Sequence[str], int]:
    """(prompt, what stands beside it, which side): the side is 1 or −1, or 0 for what has none."""
    match record:
        case Comparison(prompt, chosen, rejected):
            return prompt, (chosen, rejected), int(np.sign(record.preference - 0.5))
        case Verdict(prompt, response):
            return prompt, (response,), 1 if record.is_good else -1
        case Demonstration(messages) | Prompt(messages):
            return messages, (), 0
        case PlainText(text):
            return (), (text,), 0


def _digest(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=16).digest()


def _write(table: pa.Table, path: Path) -> None:
    with (
        pa.OSFile(str(path), "wb") as file,
        pa.ipc.new_file(file, table.schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as writer,
    ):
        writer.write_table(table)
