from typing import Literal, get_args

import pytest

from data.formats import FORMATS, Row, parse_row, shorten
from data.records import Comparison, Demonstration, Message, PlainText, Prompt, RecordKind, Reject, Verdict

USER = {"role": "user", "content": "Why?"}
ANSWER = {"role": "assistant", "content": "Because."}
OTHER = {"role": "assistant", "content": "No idea."}
SYSTEM = {"role": "system", "content": "Be brief."}
HUGE = "x" * 200
PAIR = {"prompt": "Why?", "chosen": "x", "rejected": "y"}


def turns(*pairs: tuple[Literal["system", "user", "assistant"], str]) -> tuple[Message, ...]:
    return tuple(Message(role, content) for role, content in pairs)


ASKED = turns(("user", "Why?"))


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": [USER, ANSWER]}, turns(("user", "Why?"), ("assistant", "Because."))),
        (
            {"messages": [SYSTEM, USER, ANSWER, USER, OTHER]},
            turns(
                ("system", "Be brief."),
                ("user", "Why?"),
                ("assistant", "Because."),
                ("user", "Why?"),
                ("assistant", "No idea."),
            ),
        ),
        ({"prompt": "Why?", "completion": "Because."}, turns(("user", "Why?"), ("assistant", "Because."))),
        ({"prompt": [USER], "completion": [ANSWER]}, turns(("user", "Why?"), ("assistant", "Because."))),
        ({"prompt": [USER], "completion": "Because."}, turns(("user", "Why?"), ("assistant", "Because."))),
    ],
)
def test_each_demonstration_format_becomes_messages(row: Row, messages: tuple[Message, ...]) -> None:
    assert parse_row(row, "f:1", "demonstration") == Demonstration(messages, "f:1")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Why?", "chosen": "Because.", "rejected": "No idea."},
        {"prompt": "Why?", "chosen": [ANSWER], "rejected": [OTHER]},
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]},
        {"chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
        {"prompt": "Why?", "chosen": [USER, ANSWER], "rejected": [USER, OTHER]},  # as ultrafeedback_binarized
        {"prompt": [USER], "chosen": [USER, ANSWER], "rejected": [USER, OTHER], "score": 3},
        {"prompt": None, "chosen": [USER, ANSWER], "rejected": [USER, OTHER]},  # a Parquet column without a value
    ],
)
def test_each_comparison_format_becomes_the_same_comparison(row: Row) -> None:
    assert parse_row(row, "f:1", "comparison") == Comparison(ASKED, "Because.", "No idea.", "f:1")


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("The sky is blue.", "The sky is red.", ("The sky is", "blue.", "red.")),
        ("The sky is green.", "The sky is grey.", ("The sky is", "green.", "grey.")),  # not inside "gre"
        ("The sky is blue.", "The sky is\n red.", ("The sky is", "blue.", "red.")),
        ("Sky: is it blue", "Sky: is", ("Sky: is", "it blue", "")),
    ],
)
def test_implicit_strings_are_cut_at_white_space(chosen: str, rejected: str, expected: tuple[str, str, str]) -> None:
    record = parse_row({"chosen": chosen, "rejected": rejected}, "f:1", "comparison")
    if expected[2]:
        assert record == Comparison(turns(("user", expected[0])), expected[1], expected[2], "f:1")
    else:
        assert record == Reject("f:1", "empty response", "rejected", "''")


def test_implicit_messages_share_a_longer_prompt() -> None:
    row = {"chosen": [SYSTEM, USER, ANSWER, USER, ANSWER], "rejected": [SYSTEM, USER, ANSWER, USER, OTHER]}
    record = parse_row(row, "f:1", "comparison")
    assert isinstance(record, Comparison)
    assert [message.role for message in record.prompt] == ["system", "user", "assistant", "user"]
    assert (record.chosen, record.rejected) == ("Because.", "No idea.")


@pytest.mark.parametrize(
    ("columns", "margin", "preference"),
    [
        ({}, None, 1.0),
        ({"margin": 3, "preference": None}, 3.0, 1.0),
        ({"margin": 0.5, "preference": 1}, 0.5, 1.0),
        ({"margin": 0, "preference": 0.5}, 0.0, 0.5),  # no margin, and a tie
        ({"margin": None, "preference": 0}, None, 0.0),
    ],
)
def test_a_pair_may_say_by_how_much_or_how_surely(columns: Row, margin: float | None, preference: float) -> None:
    row = {"prompt": "Why?", "chosen": "Because.", "rejected": "No idea.", **columns}
    assert parse_row(row, "f:1", "comparison") == Comparison(
        ASKED, "Because.", "No idea.", "f:1", margin=margin, preference=preference
    )


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Why?", "completion": "Because.", "label": False},
        {"prompt": [USER], "completion": [ANSWER], "label": False},
        {"prompt": "Why?", "completion": [ANSWER], "label": False, "rater": 3},
    ],
)
def test_each_verdict_format_becomes_the_same_verdict(row: Row) -> None:
    assert parse_row(row, "f:1", "verdict") == Verdict(ASKED, "Because.", False, "f:1")


@pytest.mark.parametrize("row", [{"prompt": "Why?"}, {"prompt": [USER]}, {"messages": [USER]}])
def test_each_prompt_format_becomes_messages(row: Row) -> None:
    assert parse_row(row, "f:1", "prompt") == Prompt(ASKED, "f:1")


def test_text_is_a_demonstration_without_turns() -> None:
    assert parse_row({"text": "Once.", "id": 3}, "f:1", "demonstration") == PlainText("Once.", "f:1")


@pytest.mark.parametrize(
    ("kind", "row", "reason", "field"),
    [
        ("demonstration", {"question": "Why?"}, "missing field", "prompt"),
        ("demonstration", {"prompt": "Why?"}, "missing field", "completion"),
        ("demonstration", {"messages": [{"role": "user"}]}, "missing field", "content"),
        ("demonstration", {"messages": "Why?"}, "wrong type", "messages"),
        ("demonstration", {"messages": ["Why?"]}, "wrong type", "messages[0]"),
        ("demonstration", {"messages": [{"role": "user", "content": 3}]}, "wrong type", "messages[0].content"),
        ("demonstration", {"messages": [{"role": 3, "content": ""}]}, "wrong type", "messages[0].role"),
        ("demonstration", {"prompt": 3, "completion": "x"}, "wrong type", "prompt"),
        ("demonstration", {"prompt": " \n", "completion": "x"}, "empty prompt", "completion"),
        ("demonstration", {"messages": []}, "empty prompt", "messages"),
        ("demonstration", {"messages": [SYSTEM]}, "empty prompt", "messages"),
        ("demonstration", {"prompt": "Why?", "completion": ""}, "empty response", "completion"),
        ("demonstration", {"messages": [USER]}, "role order", "messages"),
        ("demonstration", {"messages": [ANSWER]}, "role order", "messages"),
        ("demonstration", {"messages": [USER, USER, ANSWER]}, "role order", "messages"),
        ("demonstration", {"messages": [USER, SYSTEM, ANSWER]}, "role order", "messages"),
        ("demonstration", {"messages": [{"role": "tool", "content": ""}]}, "role order", "messages[0].role"),
        ("demonstration", {"prompt": "\ud800", "completion": "x"}, "malformed", "prompt"),
        ("comparison", {"prompt": "Why?", "chosen": "x"}, "missing field", "rejected"),
        ("comparison", {"chosen": "x", "rejected": [ANSWER]}, "wrong type", "rejected"),
        ("comparison", {"chosen": "blue", "rejected": "red"}, "empty prompt", "prompt"),
        ("comparison", {"prompt": "Why?", "chosen": "", "rejected": "x"}, "empty response", "chosen"),
        ("comparison", {"prompt": "Why?", "chosen": "x", "rejected": "x\n"}, "identical pair", "rejected"),
        ("comparison", {"chosen": "same", "rejected": "same"}, "identical pair", "rejected"),
        ("comparison", {"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}, "identical pair", "rejected"),
        ("comparison", {"chosen": [USER, ANSWER], "rejected": [USER]}, "role order", "rejected"),
        ("comparison", {"chosen": [USER, ANSWER, USER, ANSWER], "rejected": [USER, OTHER]}, "role order", "chosen"),
        ("comparison", {"prompt": [USER, ANSWER], "chosen": [ANSWER], "rejected": [OTHER]}, "role order", "prompt"),
        ("comparison", {**PAIR, "margin": -1}, "out of range", "margin"),
        ("comparison", {**PAIR, "margin": float("nan")}, "out of range", "margin"),
        ("comparison", {**PAIR, "margin": 10**400}, "out of range", "margin"),
        ("comparison", {**PAIR, "margin": "2"}, "wrong type", "margin"),
        ("comparison", {**PAIR, "preference": 1.01}, "out of range", "preference"),
        ("comparison", {**PAIR, "preference": True}, "wrong type", "preference"),
        ("comparison", {**PAIR, "margin": 1, "preference": 0.9}, "margin with soft label", "margin"),
        ("comparison", {**PAIR, "margin": 1, "preference": 0}, "margin with soft label", "margin"),
        ("verdict", {"prompt": "Why?", "label": True}, "missing field", "completion"),
        ("verdict", {"prompt": "Why?", "completion": "x"}, "missing field", "label"),
        ("verdict", {"prompt": "Why?", "completion": "x", "label": 1}, "wrong type", "label"),
        ("verdict", {"prompt": "Why?", "completion": " ", "label": True}, "empty response", "completion"),
        ("verdict", {"prompt": "Why?", "completion": [USER], "label": True}, "role order", "completion"),
        ("verdict", {"prompt": [ANSWER], "completion": "x", "label": True}, "role order", "prompt"),
        ("prompt", {"messages": [USER, ANSWER]}, "role order", "messages"),
        ("prompt", {"prompt": ""}, "empty prompt", "prompt"),
        ("prompt", {}, "missing field", "prompt"),
        ("demonstration", {"text": " "}, "empty text", "text"),
    ],
)
def test_a_row_that_does_not_fit_is_rejected_with_its_reason_and_field(
    kind: RecordKind, row: Row, reason: str, field: str
) -> None:
    reject = parse_row(row, "f:7", kind)
    assert isinstance(reject, Reject)
    assert (reject.source, reject.reason, reject.field) == ("f:7", reason, field)
    assert reject.detail


def test_a_rejects_detail_shows_what_was_seen_in_one_short_line() -> None:
    reject = parse_row({"prompt": {"deep": HUGE}}, "f:1", "prompt")
    assert isinstance(reject, Reject)
    assert "{'deep': 'xxx" in reject.detail
    assert len(reject.detail) < 110
    assert shorten("a\n  b") == "a b"
    assert len(shorten(HUGE)) == 80


def test_every_kind_has_its_formats_named() -> None:
    assert set(FORMATS) == set(get_args(RecordKind))
