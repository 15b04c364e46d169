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

from collections.abc import Sequence
from itertools import accumulate, chain
from typing import Any, cast

import pyarrow as pa

from data.records import Comparison, Demonstration, Message, PlainText, Prompt, Record, RecordKind, Reject, Verdict

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_ORIGIN = [("source", pa.string()), ("line", pa.int64()), ("content_hash", pa.string())]
_OWN: dict[RecordKind, list[tuple[str, pa.DataType]]] = {
    "comparison": [
        ("prompt", MESSAGES),
        ("chosen", pa.string()),
        ("rejected", pa.string()),
        ("margin", pa.float64()),
        ("preference", pa.float64()),
    ],
    "verdict": [("prompt", MESSAGES), ("completion", pa.string()), ("label", pa.bool_())],
    "demonstration": [("messages", MESSAGES), ("text", pa.string())],
    "prompt": [("prompt", MESSAGES)],
}
SCHEMAS: dict[RecordKind, pa.Schema] = {kind: pa.schema([*own, *_ORIGIN]) for kind, own in _OWN.items()}
REJECTS = pa.schema(
    [
        (name, pa.int64() if name == "line" else pa.large_string())
        for name in ("line", "reason", "field", "detail", "row")
    ]
)


def table_of(
    kind: RecordKind, records: Sequence[Record], lines: Sequence[int], source: str, hashes: Sequence[str]
) -> pa.Table:
    """The records as columns. Built flat: a list of messages for each row would take ten times as long."""
    origin = [
        pa.array([source] * len(records), pa.string()),
        pa.array(lines, pa.int64()),
        pa.array(hashes, pa.string()),
    ]
    return pa.Table.from_arrays([*_columns(kind, records), *origin], schema=SCHEMAS[kind])


def rejects_table(rejects: Sequence[tuple[int, Reject, str]]) -> pa.Table:
    """`rejects`: (line, why, the row whole)."""
    rows = [(line, reject.reason, reject.field, reject.detail, row) for line, reject, row in rejects]
    columns = list(zip(*rows, strict=True)) or [()] * len(REJECTS)
    return pa.Table.from_arrays(
        [pa.array(column, field.type) for column, field in zip(columns, REJECTS, strict=True)], schema=REJECTS
    )


def _columns(kind: RecordKind, records: Sequence[Record]) -> list["pa.Array[Any]"]:
    if kind == "comparison":
        pairs = cast(Sequence[Comparison], records)
        preferences = [None if pair.preference == 1.0 else pair.preference for pair in pairs]
        return [
            _messages([pair.prompt for pair in pairs]),
            pa.array([pair.chosen for pair in pairs], pa.string()),
            pa.array([pair.rejected for pair in pairs], pa.string()),
            pa.array([pair.margin for pair in pairs], pa.float64()),
            pa.array(preferences, pa.float64()),
        ]
    if kind == "verdict":
        verdicts = cast(Sequence[Verdict], records)
        return [
            _messages([verdict.prompt for verdict in verdicts]),
            pa.array([verdict.response for verdict in verdicts], pa.string()),
            pa.array([verdict.is_good for verdict in verdicts], pa.bool_()),
        ]
    if kind == "prompt":
        return [_messages([prompt.messages for prompt in cast(Sequence[Prompt], records)])]
    return [
        _messages([record.messages if isinstance(record, Demonstration) else None for record in records]),
        pa.array([record.text if isinstance(record, PlainText) else None for record in records], pa.string()),
    ]


def _messages(conversations: Sequence[Sequence[Message] | None]) -> "pa.Array[Any]":
    turns = list(chain.from_iterable(conversation or () for conversation in conversations))
    roles = pa.array([turn.role for turn in turns], pa.string())
    contents = pa.array([turn.content for turn in turns], pa.string())
    offsets = list(accumulate((len(conversation or ()) for conversation in conversations), initial=0))
    mask = pa.array([conversation is None for conversation in conversations], pa.bool_())
    values = pa.StructArray.from_arrays([roles, contents], fields=list(MESSAGES.value_type))
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values, type=MESSAGES, mask=mask)
