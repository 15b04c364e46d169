"""The columns of a data set: what stands in its Parquet files, and the rejected rows on their way.

| kind          | columns                                                                      |
| ------------- | ---------------------------------------------------------------------------- |
| comparison    | prompt (messages), chosen, rejected, margin, preference (none is 1; 0.5: tie) |
| verdict       | prompt (messages), completion, label                                         |
| demonstration | messages, or text                                                            |
| prompt        | prompt (messages)                                                            |

and of each row: source (the file), line, content_hash (BLAKE2b, 32 hex digits). These are names that
data.formats reads, so a data set is read like any other file.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, chain
from operator import attrgetter
from typing import Any

import pyarrow as pa

from data.records import Comparison, Demonstration, Message, PlainText, Record, RecordKind

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
Column = tuple[str, pa.DataType, Callable[[Any], object]]  # name, type, what of a record stands in it


def _preference(pair: Comparison) -> float | None:
    return None if pair.preference == 1.0 else pair.preference


def _messages(record: Demonstration | PlainText) -> tuple[Message, ...] | None:
    return record.messages if isinstance(record, Demonstration) else None


def _text(record: Demonstration | PlainText) -> str | None:
    return record.text if isinstance(record, PlainText) else None


_OWN: Mapping[RecordKind, Sequence[Column]] = {
    "comparison": [
        ("prompt", MESSAGES, attrgetter("prompt")),
        ("chosen", pa.string(), attrgetter("chosen")),
        ("rejected", pa.string(), attrgetter("rejected")),
        ("margin", pa.float64(), attrgetter("margin")),
        ("preference", pa.float64(), _preference),
    ],
    "verdict": [
        ("prompt", MESSAGES, attrgetter("prompt")),
        ("completion", pa.string(), attrgetter("response")),
        ("label", pa.bool_(), attrgetter("is_good")),
    ],
    "demonstration": [("messages", MESSAGES, _messages), ("text", pa.string(), _text)],
    "prompt": [("prompt", MESSAGES, attrgetter("messages"))],
}
_ORIGIN = [("source", pa.string()), ("line", pa.int64()), ("content_hash", pa.string())]
SCHEMAS = {kind: pa.schema([*((name, of) for name, of, _ in own), *_ORIGIN]) for kind, own in _OWN.items()}
_REJECT = ("reason", "field", "detail", "row")
REJECTS = pa.schema([("line", pa.int64()), *((name, pa.large_string()) for name in _REJECT)])


def table_of(
    kind: RecordKind, records: Sequence[Record], lines: Sequence[int], source: str, hashes: Sequence[str]
) -> pa.Table:
    """The records as columns."""
    columns: dict[str, Any] = {"source": [source] * len(records), "line": lines, "content_hash": hashes}
    for name, of, value in _OWN[kind]:
        values = [value(record) for record in records]
        columns[name] = _conversations(values) if of is MESSAGES else values
    return pa.table(columns, schema=SCHEMAS[kind])


def _conversations(conversations: Sequence[Any]) -> "pa.Array[Any]":
    """Built flat: a list of messages for each row would take ten times as long."""
    turns: list[Message] = list(chain.from_iterable(conversation or () for conversation in conversations))
    roles = pa.array([turn.role for turn in turns], pa.string())
    contents = pa.array([turn.content for turn in turns], pa.string())
    offsets = list(accumulate((len(conversation or ()) for conversation in conversations), initial=0))
    mask = pa.array([conversation is None for conversation in conversations], pa.bool_())
    values = pa.StructArray.from_arrays([roles, contents], fields=list(MESSAGES.value_type))
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values, type=MESSAGES, mask=mask)
