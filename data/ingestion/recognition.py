"""Which shape a raw row has, by its keys and the types of their values. A null is no value: Parquet fills with them.

The shapes exclude each other. A row that judges an answer is never a demonstration, nor a prompt: a format that we do
not know is better refused than half of it learnt.
"""

from collections.abc import Sequence
from typing import cast

from data.formats import Row
from data.ingestion.flat import MARKS, has_verdict
from data.ingestion.transcripts import is_transcript

_JUDGED = ("chosen", "rejected", "rejected_response", "rejected_messages", "label", "kto_tag", *MARKS)
# Key parts that say that a row beside its prompt holds more than we would take from it.
_ANSWER_WORDS = ("better", "chosen", "completion", "label", "output", "preference", "preferred", "reject", "respon")
_STRUCTURED = ("prompt", "messages", "conversations", "instruction", "completion", "chosen", "rejected", "info", "role")


def _has(row: Row, *keys: str) -> bool:
    return all(row.get(key) is not None for key in keys)


def _has_any(row: Row, keys: Sequence[str]) -> bool:
    return any(row.get(key) is not None for key in keys)


def is_trl_preference(row: Row) -> bool:
    sides = (row.get("chosen"), row.get("rejected"))
    is_other = is_hh_rlhf(row) or is_alpaca_preference(row) or _has(row, "conversations")
    return all(isinstance(side, str | list) for side in sides) and not is_other


def is_trl_unpaired(row: Row) -> bool:
    return _has(row, "prompt", "completion") and isinstance(row.get("label"), bool)


def is_thumbs(row: Row) -> bool:
    has_answer = _has_any(row, ("completion", "response"))
    return _has(row, "prompt") and has_answer and has_verdict(row) and not is_trl_unpaired(row)


def is_trl_prompt_completion(row: Row) -> bool:
    return _has(row, "prompt", "completion") and not _has_any(row, _JUDGED)


def is_trl_messages(row: Row) -> bool:
    return _has_messages(row) and not _ends_with_user(row)


def is_trl_prompt(row: Row) -> bool:
    if _has(row, "messages"):
        return _has_messages(row) and _ends_with_user(row)
    holds_more = any(word in key.lower() for key in row if _has(row, key) for word in _ANSWER_WORDS)
    is_chat = _has_any(row, ("conversations", "instruction", "text"))
    return isinstance(row.get("prompt"), str | list) and not holds_more and not is_chat


def is_text(row: Row) -> bool:
    return isinstance(row.get("text"), str) and not _has_any(row, _STRUCTURED)


def is_hh_rlhf(row: Row) -> bool:
    before, chosen = row.get("prompt"), row.get("chosen")
    if before is None:
        return is_transcript(chosen) and isinstance(row.get("rejected"), str)
    is_start = is_transcript(before) and str(before).rstrip().endswith("Assistant:")
    return is_start and isinstance(chosen, str) and isinstance(row.get("rejected"), str)


def is_openai_preference(row: Row) -> bool:
    return isinstance(row.get("input"), dict) and _has_any(row, ("preferred_output", "non_preferred_output"))


def is_sharegpt(row: Row) -> bool:
    return isinstance(row.get("conversations"), list) and not _has_any(row, _JUDGED)


def is_sharegpt_preference(row: Row) -> bool:
    return isinstance(row.get("conversations"), list) and _has(row, "chosen", "rejected")


def is_alpaca(row: Row) -> bool:
    is_pair = isinstance(row.get("instruction"), str) and isinstance(row.get("output"), str)
    return is_pair and not _has_any(row, (*_JUDGED, "prompt", "completions", "messages", "conversations"))


def is_alpaca_preference(row: Row) -> bool:
    has_sides = _has(row, "chosen", "rejected") or isinstance(row.get("output"), list)
    is_other = _has_any(row, ("prompt", "completions", "conversations"))
    return isinstance(row.get("instruction"), str) and has_sides and not is_other


def is_oasst_trees(row: Row) -> bool:
    return _has(row, "message_tree_id") and isinstance(row.get("prompt"), dict)


def is_ultrafeedback(row: Row) -> bool:
    return isinstance(row.get("instruction"), str) and isinstance(row.get("completions"), list)


def is_summarize_from_feedback(row: Row) -> bool:
    return isinstance(row.get("info"), dict) and isinstance(row.get("summaries"), list)


def _has_messages(row: Row) -> bool:
    return isinstance(row.get("messages"), list) and not _has_any(row, (*_JUDGED, "completion"))


def _ends_with_user(row: Row) -> bool:
    messages = cast(list[object], row["messages"])
    last = messages[-1] if messages else None
    return isinstance(last, dict) and cast(Row, last).get("role") == "user"
