"""From one raw row to one record, or to a reject that says why not.

The format is detected by the row's keys; the formats are those that TRL documents for its data sets. Other columns
are ignored. A string prompt becomes one user message. Roles: an optional system message first, then user and
assistant in turns, the user first.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar, cast

from data.records import (
    Comparison,
    Demonstration,
    Message,
    PlainText,
    Prompt,
    Record,
    RecordKind,
    Reject,
    Role,
    UnfitError,
    Verdict,
)

Row = Mapping[str, object]
ValueT = TypeVar("ValueT")

FORMATS: Mapping[RecordKind, tuple[str, ...]] = {
    "demonstration": ("messages", "prompt + completion", "text"),
    "comparison": ("prompt + chosen + rejected", "chosen + rejected", "both also with margin or preference"),
    "verdict": ("prompt + completion + label (true or false)",),
    "prompt": ("prompt", "messages, the last one the user's"),
}

_ROLES: Mapping[object, Role] = {"system": "system", "user": "user", "assistant": "assistant"}
_DETAIL_LENGTH = 80


def parse_row(row: Row, source: str, kind: RecordKind) -> Record | Reject:
    """The record of `kind` that `row` holds; `source` ("file.jsonl:12") is kept in it."""
    try:
        return _PARSERS[kind](row, source)
    except UnfitError as unfit:
        return unfit.reject(source)


def escape(text: str) -> str:
    """With lone surrogates, which UTF-8 cannot hold, as escapes."""
    return text.encode("utf-8", errors="backslashreplace").decode()


def shorten(value: object) -> str:
    """`value` as one line of at most 80 characters."""
    try:
        line = " ".join((value if isinstance(value, str) else repr(value)).split())
    except RecursionError:  # json reads lists nested deeper than repr, called from further down the stack, can write
        line = f"a deeply nested {type(value).__name__}"
    line = escape(line)
    return line if len(line) <= _DETAIL_LENGTH else line[: _DETAIL_LENGTH - 1] + "…"


def demonstration(row: Row, source: str) -> Demonstration | PlainText:
    """`messages`, or `prompt` + `completion`; in both, every assistant turn is one to learn. Or plain `text`. A row
    that judges its answer is none of these."""
    if isinstance(row.get("label"), bool):
        raise UnfitError("judged answer", "label", f"{row['label']}: a verdict is for reward training")
    if row.get("text") is not None and row.get("messages") is None and row.get("prompt") is None:
        return plain_text(row, source)
    if row.get("messages") is not None:
        field, messages = "messages", _messages(row["messages"], "messages")
        check_learnt(row["messages"])
    else:
        field = "completion"
        messages = _as_messages(row, "prompt", "user") + _as_messages(row, "completion", "assistant")
    _check_turns(messages, field, last="assistant")
    return Demonstration(messages, source)


def check_learnt(messages: object) -> None:
    """UnfitError for OpenAI's `weight: 0`: every assistant turn of a demonstration is learnt."""
    for index, item in enumerate(cast(list[object], messages) if isinstance(messages, list) else []):
        message = cast(Row, item) if isinstance(item, dict) else {}
        if message.get("role") == "assistant" and message.get("weight") == 0:
            raise UnfitError("unlearnt turn", f"messages[{index}].weight", "0, where every assistant turn is learnt")


def comparison(row: Row, source: str) -> Comparison:
    """`chosen` + `rejected`, with the prompt beside them or as what both begin with.

    Optional: `margin` (0 or more) and `preference` (from 0 to 1, the probability that `chosen` is preferred).
    """
    chosen, rejected = present(row, "chosen"), present(row, "rejected")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise UnfitError("wrong type", "rejected", f"{shorten(rejected)}, where chosen is {type(chosen).__name__}")
    if isinstance(chosen, str):
        prompt, sides = _compared_strings(row, as_text(chosen, "chosen"), as_text(rejected, "rejected"))
    else:
        prompt, sides = _compared_messages(row, _messages(chosen, "chosen"), _messages(rejected, "rejected"))
    _check_turns(prompt, "prompt", last="user")
    for field, side in zip(("chosen", "rejected"), sides, strict=True):
        if not side.strip():
            raise UnfitError("empty response", field, repr(side))
    if sides[0].strip() == sides[1].strip():
        raise UnfitError("identical pair", "rejected", shorten(sides[1]))
    margin, preference = _number(row, "margin", most=math.inf), _number(row, "preference", most=1.0)
    if margin and preference not in (None, 1):  # a margin is of a certain order; no formula has both
        raise UnfitError("margin with soft label", "margin", f"margin {margin:g} beside preference {preference:g}")
    return Comparison(prompt, *sides, source, margin, 1.0 if preference is None else preference)


def verdict(row: Row, source: str) -> Verdict:
    """`prompt` + `completion` + `label`: TRL's unpaired preferences."""
    prompt = _as_messages(row, "prompt", "user")
    _check_turns(prompt, "prompt", last="user")
    completion = _as_messages(row, "completion", "assistant")
    _check_one_answer(completion, "completion")
    if not completion[0].content.strip():
        raise UnfitError("empty response", "completion", repr(completion[0].content))
    label = typed(present(row, "label"), bool, "label", "not true or false")
    return Verdict(prompt, completion[0].content, label, source)


def prompt(row: Row, source: str) -> Prompt:
    """`prompt` (a string or messages), or `messages`; the last turn is the user's."""
    field = "messages" if row.get("prompt") is None and row.get("messages") is not None else "prompt"
    messages = _as_messages(row, field, "user")
    _check_turns(messages, field, last="user")
    return Prompt(messages, source)


def plain_text(row: Row, source: str) -> PlainText:
    """`text`."""
    text = as_text(present(row, "text"), "text")
    if not text.strip():
        raise UnfitError("empty text", "text", repr(text))
    return PlainText(text, source)


_PARSERS: Mapping[RecordKind, Callable[[Row, str], Record]] = {
    "demonstration": demonstration,
    "comparison": comparison,
    "verdict": verdict,
    "prompt": prompt,
}


def _compared_strings(row: Row, chosen: str, rejected: str) -> tuple[tuple[Message, ...], tuple[str, str]]:
    if row.get("prompt") is not None:
        return _as_messages(row, "prompt", "user"), (chosen, rejected)
    if "prompt" in row:  # what two bare answers begin with is no prompt
        raise UnfitError("missing field", "prompt", "null, beside answers that are strings")
    if chosen == rejected:
        raise UnfitError("identical pair", "rejected", shorten(rejected))
    border = _common_border(chosen, rejected)
    # The template separates the turns, so the white space at the cut belongs to neither.
    prompt = (Message("user", chosen[:border].strip()),)
    return prompt, (chosen[border:].lstrip(), rejected[border:].lstrip())


def _common_border(first: str, second: str) -> int:
    """The length of the longest common prefix that does not end inside a word."""
    end = _common_length(first, second)
    if all(len(text) == end or text[end].isspace() for text in (first, second)):
        return end
    while end > 0 and not first[end - 1].isspace():
        end -= 1
    return end


def _common_length(first: Sequence[object], second: Sequence[object]) -> int:
    low, high = 0, min(len(first), len(second))
    while low < high:  # bisection by slices: prompts are long, and a loop over their characters is slow
        middle = (low + high + 1) // 2
        low, high = (middle, high) if first[low:middle] == second[low:middle] else (low, middle - 1)
    return low


def _compared_messages(
    row: Row, chosen: tuple[Message, ...], rejected: tuple[Message, ...]
) -> tuple[tuple[Message, ...], tuple[str, str]]:
    if row.get("prompt") is not None and len(chosen) == len(rejected) == 1:
        prompt = _as_messages(row, "prompt", "user")
    elif chosen == rejected:
        raise UnfitError("identical pair", "rejected", f"{len(rejected)} equal messages")
    else:
        # Beside a `prompt`, both may still hold the whole conversation (ultrafeedback_binarized does that).
        prompt = chosen[: _common_length(chosen, rejected)]
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        if row.get("prompt") is not None:
            prompt = _of_one_prompt(_as_messages(row, "prompt", "user"), prompt)
    for field, side in (("chosen", chosen), ("rejected", rejected)):
        _check_one_answer(side, field)
    return prompt, (chosen[0].content, rejected[0].content)


def _of_one_prompt(given: tuple[Message, ...], common: tuple[Message, ...]) -> tuple[Message, ...]:
    """What the conversations of both sides have in common, after the system message that stands in their prompt alone.
    UnfitError if the prompt is neither how that begins nor how it ends."""
    norms = given[:1] if given and given[0].role == "system" else ()
    turns, own = ([turn for turn in side if turn.role != "system"] for side in (given, common))
    said, held = ([(turn.role, turn.content.strip()) for turn in side] for side in (turns, own))
    if said and said not in (held[: len(said)], held[-len(said) :]):
        raise UnfitError("prompts differ", "prompt", shorten(f"{turns[-1].content}; where both sides begin otherwise"))
    return common if common and common[0].role == "system" else (*norms, *common)


def _check_one_answer(side: Sequence[Message], field: str) -> None:
    if [message.role for message in side] != ["assistant"]:
        roles = ", ".join(message.role for message in side) or "nothing"
        raise UnfitError("role order", field, shorten(f"{roles} after the prompt, not one assistant turn"))


def _number(row: Row, field: str, *, most: float) -> float | None:
    """The finite number from 0 to `most` in an optional column; None if there is none."""
    value = row.get(field)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UnfitError("wrong type", field, f"{shorten(value)}, not a number")
    try:
        number = float(value)
    except OverflowError:  # JSON knows no limit
        number = math.inf
    if not (math.isfinite(number) and 0 <= number <= most):
        limits = "0 or more, and finite" if most == math.inf else f"from 0 to {most:g}"
        raise UnfitError("out of range", field, f"{shorten(value)}, not {limits}")
    return number


def present(row: Row, field: str) -> object:
    """The value of a column that must be there. UnfitError if it is missing or null."""
    value = row.get(field)
    if value is None:
        raise UnfitError("missing field", field, shorten(f"keys are {', '.join(row) or 'none'}"))
    return value


def typed(value: object, kind: type[ValueT], field: str, otherwise: str) -> ValueT:
    """`value` itself. UnfitError if it is not of this kind; `otherwise` says so: "not a string"."""
    if not isinstance(value, kind):
        raise UnfitError("wrong type", field, f"{shorten(value)}, {otherwise}")
    return value


def as_text(value: object, field: str) -> str:
    """`value` as a string that a tokenizer takes. UnfitError if it is none."""
    text = typed(value, str, field, "not a string")
    try:
        if not text.isascii():
            text.encode()
    except UnicodeEncodeError as error:  # a lone surrogate is valid JSON, but no tokenizer takes it
        raise UnfitError("malformed", field, shorten(str(error))) from None
    return text


def check_no_tools(message: Row, field: str) -> None:
    if message.get("tool_calls") or message.get("function_call"):
        raise UnfitError("role order", field, "calls a tool")


def _as_messages(row: Row, field: str, role: Role) -> tuple[Message, ...]:
    value = present(row, field)
    return (Message(role, as_text(value, field)),) if isinstance(value, str) else _messages(value, field)


def _messages(value: object, field: str) -> tuple[Message, ...]:
    items = typed(value, list, field, "not a list of messages")
    return tuple(_message(item, f"{field}[{index}]") for index, item in enumerate(items))


def _message(item: object, field: str) -> Message:
    message: Row = typed(item, dict, field, "not a message")
    check_no_tools(message, field)
    role, content = present(message, "role"), present(message, "content")
    role = typed(role, str, f"{field}.role", "not a string")
    if role not in _ROLES:
        raise UnfitError("role order", f"{field}.role", f"unknown role {shorten(role)}")
    return Message(_ROLES[role], as_text(content, f"{field}.content"))


def _check_turns(messages: Sequence[Message], field: str, *, last: Role) -> None:
    turns = messages[1:] if messages and messages[0].role == "system" else messages
    if not turns:
        raise UnfitError("empty prompt", field, "no turns")
    if any(turn.role != ("user", "assistant")[index % 2] for index, turn in enumerate(turns)) or turns[-1].role != last:
        roles = ", ".join(message.role for message in messages)
        raise UnfitError("role order", field, shorten(f"{roles}; wanted user first, in turns, {last} last"))
    for turn in turns:
        if not turn.content.strip():
            reason = "empty prompt" if turn.role == "user" else "empty response"
            raise UnfitError(reason, field, repr(turn.content))
