"""Anthropic's hh-rlhf: a pair of whole conversations, each one string."""

import re

from data.formats import Row, present, shorten
from data.records import UnfitError

_TURN = re.compile(r"\n\n(Human|Assistant):")
_ASSISTANT = "\n\nAssistant:"
_HUMAN = "\n\nHuman:"
_ROLES = {"Human": "user", "Assistant": "assistant"}


def is_pair(row: Row) -> bool:
    """Of a row with two strings: is it a pair of transcripts, or of answers to the one in `prompt`?"""
    before = row.get("prompt")
    if before is None:
        return _is_transcript(row["chosen"])
    return _is_transcript(before) and str(before).rstrip().endswith("Assistant:")


def hh_rlhf(row: Row) -> list[dict[str, object]]:
    """The prompt is all before the last Assistant turn, and must be the same on both sides.

    A `prompt` column beside the sides (Dahoas' copies of the data set have one) is what both of them begin with.
    """
    prompt, chosen = _cut(row, "chosen")
    other_prompt, rejected = _cut(row, "rejected")
    turns = _turns(prompt, "chosen")
    if prompt != other_prompt and turns != _turns(other_prompt, "rejected"):
        raise UnfitError("prompts differ", "rejected", shorten(f"…{other_prompt[-70:]}"))
    return [{"prompt": turns, "chosen": chosen, "rejected": rejected}]


def _is_transcript(value: object) -> bool:
    return isinstance(value, str) and value.lstrip().startswith("Human:") and _ASSISTANT in value


def _cut(row: Row, field: str) -> tuple[str, str]:
    """What comes before the last Assistant turn, and that turn."""
    side, before = present(row, field), row.get("prompt")
    if not isinstance(side, str) or not isinstance(before, str | None):
        raise UnfitError("wrong type", field, f"{shorten(side)}, not a transcript")
    prompt, found, answer = (side if before is None else before + side).rpartition(_ASSISTANT)
    if not found:
        raise UnfitError("malformed", field, f"no Assistant turn in {shorten(side)}")
    if _HUMAN in answer:
        raise UnfitError("role order", field, "the last turn is Human's")
    return prompt, answer.strip()


def _turns(prompt: str, field: str) -> list[dict[str, object]]:
    start, *parts = _TURN.split(prompt if prompt.startswith(_HUMAN) else f"\n\n{prompt.lstrip()}")
    if start.strip():
        raise UnfitError("malformed", field, f"before the first turn: {shorten(start)}")
    return [{"role": _ROLES[name], "content": said.strip()} for name, said in zip(parts[::2], parts[1::2], strict=True)]
