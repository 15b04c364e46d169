"""Files that no one should have written: rows of many formats with values exchanged for others, bytes damaged."""

import csv
import gzip
import io
import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

Row = dict[str, object]

BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class MangledFile:
    ending: str  # ".jsonl.gz"
    content: bytes

    def write(self, folder: Path, name: str = "mangled") -> Path:
        path = folder / f"{name}{self.ending}"
        path.write_bytes(self.content)
        return path


def good_row(number: int) -> Row:
    """A comparison that is kept, and is like no other number's."""
    return {"prompt": f"Question {number}?", "chosen": f"Answer {number}.", "rejected": f"No answer to {number}."}


def _turn(role: str, content: str) -> Row:
    return {"role": role, "content": content}


VALID_ROWS: tuple[Row, ...] = (
    good_row(0),
    {"chosen": "\n\nHuman: A?\n\nAssistant: B.", "rejected": "\n\nHuman: A?\n\nAssistant: C."},
    {"chosen": [_turn("user", "A?"), _turn("assistant", "B.")],
     "rejected": [_turn("user", "A?"), _turn("assistant", "")]},
    {"prompt": [_turn("system", "S"), _turn("user", "A?")], "completion": [_turn("assistant", "B.")], "label": True},
    {"prompt": "A?", "completion": "B.", "label": 1},
    {"prompt": "A?", "completion": "B."},
    {"messages": [_turn("user", "A?"), _turn("assistant", "B."), _turn("user", "C?"), _turn("assistant", "D.")]},
    {"messages": [_turn("user", "A?")]},
    {"prompt": "A?"},
    {"text": "Plain."},
    {"instruction": "A?", "input": "", "output": "B."},
    {"instruction": "A?", "chosen": "B.", "rejected": "C.", "margin": 0.5},
    {"conversations": [{"from": "human", "value": "A?"}, {"from": "gpt", "value": "B."}]},
    {"conversations": [{"from": "human", "value": "A?"}], "chosen": {"from": "gpt", "value": "B."},
     "rejected": {"from": "gpt", "value": "C."}},
    {"input": {"messages": [_turn("user", "A?")]}, "preferred_output": [_turn("assistant", "B.")],
     "non_preferred_output": [_turn("assistant", "C.")]},
    {"instruction": "A?",
     "completions": [{"response": "B.", "overall_score": 4}, {"response": "C.", "overall_score": 1}]},
    {"info": {"post": "A."}, "summaries": [{"text": "B."}, {"text": "C."}], "choice": 1},
    {"message_tree_id": "x", "prompt": {"role": "prompter", "text": "A?", "replies": [
        {"role": "assistant", "text": "B.", "rank": 0, "replies": []},
        {"role": "assistant", "text": "C.", "rank": 1}]}},
)  # fmt: skip

# Lone surrogates among them: JSON may hold those, escaped.
_texts = st.text(max_size=12) | st.sampled_from(
    ("\ud800", "\x00", "\ufeff", "\u2028", "\r", "NaN", " ", "ﬁ", "\x1e\x1f")
)
_atoms = (
    st.none() | st.booleans() | st.integers() | st.floats() | _texts | st.sampled_from((10**400, -(2**64), 0.5, -0.0))
)
values = st.recursive(
    _atoms,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(_texts | st.sampled_from(("role", "content")), inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def mangled_rows(draw: st.DrawFn) -> Row:
    """A valid row in which up to three values, at any depth, have been exchanged, lost, or said again elsewhere."""
    row = deepcopy(draw(st.sampled_from(VALID_ROWS)))
    for _ in range(draw(st.integers(0, 3))):
        places = list(_places(row))
        if not places:
            break
        holder, key = draw(st.sampled_from(places))
        match draw(st.sampled_from(("exchange", "lose", "add"))), holder:
            case "exchange", _:
                holder[key] = draw(values)  # type: ignore[index]  # key is of the holder's own kind
            case "lose", _:
                del holder[key]  # type: ignore[arg-type]
            case _, dict():
                holder[draw(_texts | st.sampled_from(("prompt", "chosen", "margin", "preference", "label")))] = draw(
                    values
                )
            case _:
                holder.append(draw(values))
    return row


def _places(value: object) -> list[tuple[dict[str, object] | list[object], object]]:
    """Every value within `value`, by what holds it."""
    if isinstance(value, dict):
        held = cast(dict[str, object], value)
        return [(held, key) for key in held] + [place for inner in held.values() for place in _places(inner)]
    if isinstance(value, list):
        listed = cast(list[object], value)
        return [(listed, n) for n in range(len(listed))] + [place for inner in listed for place in _places(inner)]
    return []


def _encoded(row: Row) -> bytes:
    return json.dumps(row).encode()  # NaN and Infinity as such, surrogates escaped


# No JSON object each, and no line break within.
BROKEN_LINES = (
    b"{", b"}", b"[]", b"null", b"NaN", b'"text"', b"\x00", b"{'prompt': 'A?'}", b'{"prompt": "A?",}', b"[" * 100_000,
    b'{"prompt": "A?"} {"prompt": "B?"}', b'{"prompt": "\x00"}', b'{"prompt": "\xff"}', b'{"prompt": "\\ud8"}',
    b'{"prompt": ' + b'{"a": ' * 50_000, b'{"prompt": ' + b"1" * 5000 + b"}",
    b"\xff\xfe{\x00}\x00", b"{\x00}\x00",  # an object, but in UTF-16
)  # fmt: skip
_DEEP = tuple(
    b'{"prompt": "A?", "chosen": ' + b"[" * depth + b"]" * depth + b', "rejected": "B."}'
    for depth in (2, 200, 900, 950, 990)
)
_bytes = st.binary(max_size=40)
_lines = mangled_rows().map(_encoded) | st.sampled_from((*BROKEN_LINES, *_DEEP, b"", b"  ")) | _bytes


@st.composite
def _json_lines(draw: st.DrawFn) -> bytes:
    lines = draw(st.lists(_lines, max_size=8))
    if draw(st.booleans()):  # most rows valid and of one format, so that the file is not refused as a whole
        lines = [_encoded(good_row(number)) for number in range(5)] + lines
    breaks = draw(st.sampled_from((b"\n", b"\r\n", b"\r", b"\n\n")))
    return draw(st.sampled_from((b"", b"", BOM))) + breaks.join(lines) + draw(st.sampled_from((b"", b"\n")))


@st.composite
def _json_array(draw: st.DrawFn) -> bytes:
    elements: list[object] = [good_row(number) for number in range(draw(st.integers(0, 5)))]
    elements += draw(st.lists(mangled_rows() | values, max_size=5))
    content = json.dumps(elements, indent=draw(st.sampled_from((None, 1)))).encode()
    return draw(st.sampled_from((b"", BOM))) + content + draw(st.sampled_from((b"", b"\n", b"]", b"{}")))


@st.composite
def _table_of_text(draw: st.DrawFn) -> bytes:
    """Ragged rows, line breaks within fields, quotes that do not close."""
    delimiter = draw(st.sampled_from((",", "\t")))
    text = io.StringIO(newline="")
    ends = draw(st.sampled_from(("\n", "\r\n")))
    table = csv.writer(text, delimiter=delimiter, lineterminator=ends)
    header = draw(st.lists(st.sampled_from(("prompt", "chosen", "rejected", "label", "prompt", "")), max_size=4))
    table.writerow(draw(st.sampled_from((header, ["prompt", "chosen", "rejected"]))))
    fields = st.text(max_size=8) | st.sampled_from(("A?\nB", "A,B", '"', "a\r\nb", "\x00", "x" * 140_000))
    for cells in draw(st.lists(st.lists(fields, max_size=4), max_size=6)):
        table.writerow(cells)
    for number in range(draw(st.integers(0, 3))):
        table.writerow(good_row(number).values())
    raw = draw(st.sampled_from((b"", BOM))) + text.getvalue().encode("utf-8", "surrogatepass")
    return raw + draw(st.sampled_from((b"", b'"never closed', b"\xff\xfe,\xff", b"\x00")))


_COLUMNS: "tuple[pa.Array[Any], ...]" = (
    pa.array(["A?", None, "B?"]),
    pa.array([1, 2, 3]),
    pa.array([float("nan"), float("inf"), None]),
    pa.array([b"\xff", b"", None]),
    pa.array([["A?"], [], None]),
    pa.array([[{"role": "user", "content": "A?"}], None, [{"role": "user", "content": None}]]),
    pa.array([10**15, 0, -(10**15)], pa.timestamp("us")),
    pa.array(["A?", "B?", "A?"]).dictionary_encode(),
    pa.nulls(3),
    pa.array([b"\xc2?", b"A?", None]).view(pa.string()),  # no UTF-8, which Arrow does not look at
)


@st.composite
def _parquet(draw: st.DrawFn) -> bytes:
    known = ("prompt", "chosen", "rejected", "messages", "text", "label")
    names: list[str] = list(draw(st.lists(st.sampled_from(known), max_size=4)))
    columns = [draw(st.sampled_from(_COLUMNS)) for _ in names]
    file = io.BytesIO()
    pq.write_table(pa.table(columns, names=names), file)
    return file.getvalue()


def _zstd(content: bytes) -> bytes:
    return pa.compress(content, codec="zstd", asbytes=True)


_COMPRESSIONS: tuple[tuple[str, Callable[[bytes], bytes]], ...] = (
    ("", bytes), ("", bytes), (".gz", lambda content: gzip.compress(content, mtime=0)), (".zst", _zstd),
    (".gz", bytes), (".zst", bytes),  # which they are not
)  # fmt: skip
_contents = st.one_of(
    st.tuples(st.sampled_from((".jsonl", ".ndjson", ".json")), _json_lines()),
    st.tuples(st.sampled_from((".json", ".json", ".jsonl")), _json_array()),
    st.tuples(st.sampled_from((".csv", ".tsv")), _table_of_text()),
    st.tuples(st.sampled_from((".jsonl", ".json", ".csv", ".parquet", ".txt", "")), st.binary(max_size=60)),
)


@st.composite
def mangled_files(draw: st.DrawFn) -> MangledFile:
    if draw(st.integers(0, 5)) == 0:
        return MangledFile(".parquet", _cut(draw, draw(_parquet())))
    ending, content = draw(_contents)
    compression, compress = draw(st.sampled_from(_COMPRESSIONS))
    return MangledFile(ending + compression, _cut(draw, compress(content)))


def _cut(draw: st.DrawFn, content: bytes) -> bytes:
    """Whole, more often than not; or cut short, or with one byte changed."""
    match draw(st.sampled_from(("whole", "whole", "whole", "cut", "changed"))):
        case "cut":
            return content[: draw(st.integers(0, len(content)))]
        case "changed" if content:
            place = draw(st.integers(0, len(content) - 1))
            return content[:place] + bytes([content[place] ^ draw(st.integers(1, 255))]) + content[place + 1 :]
        case _:
            return content
