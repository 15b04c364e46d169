"""Flat rows, of which the user says which column is what (`--map`), and verdicts in the words that people use.

CSV knows only strings, so numbers and verdicts are read out of strings too.
"""

from collections.abc import Mapping

from data.formats import Row, present, shorten
from data.ingestion.chats import canonical_turns, joined_prompt
from data.records import RecordKind, UnfitError

# Target columns, the optional ones apart, and the kind of record they make.
TARGETS: tuple[tuple[frozenset[str], frozenset[str], RecordKind], ...] = (
    (frozenset({"prompt", "chosen", "rejected"}), frozenset({"margin", "preference"}), "comparison"),
    (frozenset({"prompt", "first", "second", "better"}), frozenset({"margin"}), "comparison"),
    (frozenset({"prompt", "first", "second", "first_is_better"}), frozenset({"margin"}), "comparison"),
    (frozenset({"prompt", "completion", "label"}), frozenset(), "verdict"),
    (frozenset({"prompt", "completion"}), frozenset(), "demonstration"),
    (frozenset({"messages"}), frozenset(), "demonstration"),
    (frozenset({"text"}), frozenset(), "demonstration"),
    (frozenset({"prompt"}), frozenset(), "prompt"),
)
_OPTIONAL = frozenset[str]().union(*(optional for _, optional, _ in TARGETS))
_GOOD = ("true", "1", "up", "good", "yes")
_BAD = ("false", "0", "down", "bad", "no")
MARKS = ("label", "thumbs", "feedback", "is_good")


def split_columns(columns: str) -> tuple[str, ...]:
    """The raw columns that one target is made of: "instruction+context"."""
    return tuple(column.strip() for column in columns.split("+"))


def from_columns(columns: Mapping[str, str], row: Row) -> list[dict[str, object]]:
    """The row that the targets, a set that TARGETS lists, make of `row`."""
    values = {target: _read(row, target, source) for target, source in columns.items()}
    if "first" not in values:
        return [{target: value for target, value in values.items() if value is not None}]
    better = _better(values["better"], columns) if "better" in values else float(not values["first_is_better"])
    sides = (values["first"], values["second"])
    chosen, rejected = reversed(sides) if better == 1 else sides
    pair = {"prompt": values["prompt"], "chosen": chosen, "rejected": rejected, "margin": values.get("margin")}
    return [pair | {"preference": 0.5 if better == 0.5 else None}]


def thumbs(row: Row) -> list[dict[str, object]]:
    """`completion`, or else `response`, and the first of the columns that may hold the verdict."""
    mark = _mark(row) or "label"
    answer = "completion" if row.get("completion") is not None else "response"
    return [
        {
            "prompt": canonical_turns(present(row, "prompt"), "prompt"),
            "completion": canonical_turns(present(row, answer), answer),
            "label": as_verdict(present(row, mark), mark),
        }
    ]


def has_verdict(row: Row) -> bool:
    """Is there a verdict that `thumbs` can read? A feedback in prose is none."""
    mark = _mark(row)
    if mark is None:
        return False
    try:
        as_verdict(row[mark], mark)
    except UnfitError:
        return False
    return True


def as_verdict(value: object, field: str) -> bool:
    """True and false, 1 and 0, or words: true, up, good, yes; false, down, bad, no; "thumbs up"."""
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    word = value.strip().lower().removeprefix("thumbs").strip(" _-") if isinstance(value, str) else ""
    if word not in _GOOD + _BAD:
        raise UnfitError("wrong type", field, f"{shorten(value)}, not true or false")
    return word in _GOOD


def as_number(value: object, field: str) -> float | None:
    """A number, also one in a string; None for an empty cell."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise UnfitError("wrong type", field, f"{shorten(value)}, not a number")
    try:
        return float(value)
    except ValueError:
        raise UnfitError("wrong type", field, f"{shorten(value)}, not a number") from None
    except OverflowError:  # JSON knows no limit
        raise UnfitError("out of range", field, f"{shorten(value)}, too large") from None


def _better(value: object, columns: Mapping[str, str]) -> float:
    """0 if the first is better, 1 if the second is, 0.5 for a tie."""
    words = {"tie": 0.5, "0": 0, "1": 1, "0.0": 0, "1.0": 1, columns["first"]: 0, columns["second"]: 1}
    better = words.get(value.strip()) if isinstance(value, str) else value
    # true could mean the first as well as number 1, so it means neither
    if isinstance(better, bool) or not isinstance(better, int | float) or better not in (0, 0.5, 1):
        wanted = f"0 or {columns['first']}, 1 or {columns['second']}, nor tie"
        raise UnfitError("wrong type", columns["better"], f"{shorten(value)}, neither {wanted}")
    return better


def _mark(row: Row) -> str | None:
    return next((column for column in MARKS if row.get(column) is not None), None)


def _read(row: Row, target: str, source: str) -> object:
    if target in _OPTIONAL:
        return as_number(row.get(source), source)
    columns = split_columns(source)
    if len(columns) > 1:
        return joined_prompt(row, columns)
    value = present(row, source)
    return as_verdict(value, source) if target in ("label", "first_is_better") else canonical_turns(value, source)
