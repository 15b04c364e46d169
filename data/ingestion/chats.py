"""Rows that hold conversations or instructions: TRL's formats, OpenAI's, ShareGPT's and Alpaca's.

Messages are only renamed here (ShareGPT's `from` and `value`, its roles, OpenAI's content parts). What is no message
or out of order passes as it is, for data.formats to reject with the reason that it has for that.
"""

from typing import cast

from data.formats import Row, as_text, check_learnt, check_no_tools, present, shorten, typed
from data.records import UnfitError

_ROLES = {"human": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant", "developer": "system"}


def canonical_turns(value: object, field: str) -> object:
    """A list of messages in OpenAI's or ShareGPT's spelling in ours; anything else as it is.

    UnfitError for calls of tools, and for content that is not text.
    """
    if not isinstance(value, list):
        return value
    return [_canonical_turn(item, f"{field}[{index}]") for index, item in enumerate(cast(list[object], value))]


def joined_prompt(row: Row, columns: tuple[str, ...]) -> str:
    """The columns that hold text, joined by blank lines. UnfitError if none does."""
    texts = [as_text(row[column], column) for column in columns if row.get(column) is not None]
    if not texts:
        raise UnfitError("missing field", "+".join(columns), shorten(f"keys are {', '.join(row) or 'none'}"))
    return "\n\n".join(text for text in texts if text.strip())


def picked(row: Row, columns: tuple[str, ...]) -> list[dict[str, object]]:
    """TRL's formats are canonical but for the spelling of messages; what else stands in the row is left behind."""
    return [{column: canonical_turns(row[column], column) for column in columns if column in row}]


def trl_messages(row: Row) -> list[dict[str, object]]:
    """TRL's and OpenAI's, whose weights are looked at before they are left behind."""
    messages = present(row, "messages")
    check_learnt(messages)
    return [{"messages": canonical_turns(messages, "messages")}]


def trl_prompt(row: Row) -> list[dict[str, object]]:
    return picked(row, ("prompt" if row.get("prompt") is not None else "messages",))


def openai_preference(row: Row) -> list[dict[str, object]]:
    asked: Row = typed(present(row, "input"), dict, "input", "not an object with messages")
    return [
        {
            "prompt": canonical_turns(present(asked, "messages"), "input.messages"),
            "chosen": canonical_turns(present(row, "preferred_output"), "preferred_output"),
            "rejected": canonical_turns(present(row, "non_preferred_output"), "non_preferred_output"),
        }
    ]


def sharegpt(row: Row) -> list[dict[str, object]]:
    """LLaMA-Factory's `system` column comes first, unless the conversation has a system turn of its own."""
    return [{"messages": _conversation(row)}]


def sharegpt_preference(row: Row) -> list[dict[str, object]]:
    """LLaMA-Factory's: the conversation so far, and one message a side."""
    sides = {field: present(row, field) for field in ("chosen", "rejected")}
    turns = {field: canonical_turns([side] if isinstance(side, dict) else side, field) for field, side in sides.items()}
    return [{"prompt": _conversation(row), **turns}]


def alpaca(row: Row) -> list[dict[str, object]]:
    """`instruction` and `input` joined by a blank line, as `--map` joins; `history` are turns to learn as well."""
    return [{"messages": [*_asked(row), {"role": "assistant", "content": as_text(present(row, "output"), "output")}]}]


def alpaca_preference(row: Row) -> list[dict[str, object]]:
    """LLaMA-Factory's rankings: `chosen` and `rejected`, or in older files `output` as [better, worse]."""
    if isinstance(row.get("output"), list):
        output = cast(list[object], row["output"])
        if len(output) != 2:
            raise UnfitError("malformed", "output", f"{len(output)} answers, not [better, worse]")
        chosen, rejected = output
    else:
        chosen, rejected = present(row, "chosen"), present(row, "rejected")
    return [
        {"prompt": _asked(row), "chosen": as_text(chosen, "chosen"), "rejected": as_text(rejected, "rejected")},
    ]


def _canonical_turn(item: object, field: str) -> object:
    if not isinstance(item, dict):
        return item
    message = cast(Row, item)
    role = message.get("role") if message.get("role") is not None else message.get("from")
    content = message.get("content") if message.get("content") is not None else message.get("value")
    check_no_tools(message, field)
    if isinstance(content, list):
        content = "".join(_part(part, f"{field}.content") for part in cast(list[object], content))
    return {"role": _ROLES.get(role, role) if isinstance(role, str) else role, "content": content}


def _part(part: object, field: str) -> str:
    if not isinstance(part, dict) or cast(Row, part).get("type") != "text":
        raise UnfitError("wrong type", field, f"{shorten(part)}, not a part of type text")
    return as_text(present(cast(Row, part), "text"), field)


def _conversation(row: Row) -> object:
    turns = canonical_turns(present(row, "conversations"), "conversations")
    if not isinstance(turns, list) or not turns:
        return turns
    listed = cast(list[object], turns)
    has_own = isinstance(listed[0], dict) and cast(Row, listed[0]).get("role") == "system"
    return listed if has_own else [*_system(row), *listed]


def _asked(row: Row) -> list[object]:
    """System prompt, earlier rounds and the instruction: all that an Alpaca row has before the answer."""
    past = typed(row.get("history") or [], list, "history", "not a list of [question, answer]")
    messages = _system(row)
    for index, item in enumerate(past):
        pair = cast(list[object], item) if isinstance(item, list) else []
        if len(pair) != 2:
            raise UnfitError("malformed", f"history[{index}]", f"{shorten(item)}, not [question, answer]")
        messages += [{"role": role, "content": said} for role, said in zip(("user", "assistant"), pair, strict=True)]
    as_text(present(row, "instruction"), "instruction")
    return [*messages, {"role": "user", "content": joined_prompt(row, ("instruction", "input"))}]


def _system(row: Row) -> list[object]:
    system = row.get("system")
    return [] if system is None or system == "" else [{"role": "system", "content": system}]
