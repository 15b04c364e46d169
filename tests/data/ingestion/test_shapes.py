import pickle
import random

import pytest

from align.errors import DataError
from data.formats import parse_row
from data.ingestion.shapes import SHAPES, Row, Shape, detect, mapped
from data.records import Comparison, Message, UnfitError
from tests.data.ingestion.expected import EXPECTED, EXPECTED_OF_TABLES, Expected, pair
from tests.data.ingestion.sample_rows import ALL_SHAPES, MAPS, SAMPLES, outcomes, rows_of, sample, table


@pytest.mark.parametrize("name", SHAPES)
def test_a_sample_is_detected_as_its_shape_and_its_rows_become_the_records_expected(name: str) -> None:
    rows = sample(name)
    assert detect(rows, where="f").name == name
    assert outcomes(SHAPES[name], rows) == EXPECTED[name]


@pytest.mark.parametrize("name", MAPS)
def test_a_table_becomes_the_records_expected_by_the_columns_named(name: str) -> None:
    shape = mapped(MAPS[name])
    assert outcomes(shape, table(name)) == EXPECTED_OF_TABLES[name]
    assert all(shape.matches(row) for row in table(name))


def test_there_is_a_sample_for_each_shape() -> None:
    assert {path.stem for path in SAMPLES.glob("*.jsonl")} == set(SHAPES) == set(EXPECTED)


@pytest.mark.parametrize("name", SHAPES)
def test_no_row_of_a_sample_has_two_shapes(name: str) -> None:
    for row in sample(name):
        assert [shape.name for shape in SHAPES.values() if shape.matches(row)] in ([name], [])


@pytest.mark.parametrize(
    "row",
    [
        *(pytest.param(table(name)[0], id=name) for name in MAPS),
        {"instruction": "Hi", "output": "Go away.", "kto_tag": False},
        {"conversations": [{"from": "human", "value": "Hi"}], "label": False},
        {"messages": [{"role": "user", "content": "Hi"}], "label": False},
        {"messages": [{"role": "user", "content": "Hi"}], "rejected_response": "Go away."},
        {"prompt": "Hi", "completion": "Go away.", "feedback": "It is not kind to say this."},
        {"prompt": "Hi", "completions": ["Hello.", "Go away."], "labels": [True, False]},
        {"message_id": "1", "message_tree_id": "1", "role": "assistant", "text": "Hello."},
        {},
    ],
)
def test_a_row_of_a_format_we_do_not_know_is_not_half_taken(row: Row) -> None:
    with pytest.raises(DataError, match="none of the first 1 rows has a shape that is known"):
        detect([row], where="f")


def test_an_unknown_format_is_an_error_that_names_the_keys_the_shapes_and_the_remedy() -> None:
    with pytest.raises(DataError) as caught:
        detect([{"question": "Why?", "best": "x"}, {"worst": "y"}], where="raw.jsonl")
    message = str(caught.value)
    assert message.startswith("raw.jsonl: none of the first 2 rows")
    assert "Keys found: question, best, worst." in message
    assert "--format NAME" in message
    assert "--map" in message
    assert all(f"\n  {shape.name}: {shape.looks_like}" in message for shape in SHAPES.values())


def test_two_shapes_at_par_are_an_error_that_names_both() -> None:
    rows: list[Row] = [{"text": "Once."}, {"prompt": "Hi"}, {"odd": 1}]
    with pytest.raises(DataError, match=r"text and trl-prompt, on 1 of 3 rows each. Keys found: text, prompt, odd"):
        detect(rows, where="f")
    assert detect([*rows, {"prompt": "Bye"}], where="f").name == "trl-prompt"


def test_only_the_first_hundred_rows_are_looked_at() -> None:
    texts: list[Row] = [{"text": "Once."}] * 100
    prompts: list[Row] = [{"prompt": "Hi"}] * 200
    assert detect(texts + prompts, where="f").name == "text"


@pytest.mark.parametrize(
    ("targets", "kind"),
    [
        ("prompt chosen rejected", "comparison"),
        ("prompt chosen rejected margin preference", "comparison"),
        ("prompt first second better", "comparison"),
        ("prompt first second first_is_better margin", "comparison"),
        ("prompt completion label", "verdict"),
        ("prompt completion", "demonstration"),
        ("messages", "demonstration"),
        ("text", "demonstration"),
        ("prompt", "prompt"),
    ],
)
def test_the_targets_of_a_map_say_the_kind(targets: str, kind: str) -> None:
    assert mapped(dict.fromkeys(targets.split(), "column")).kind == kind


@pytest.mark.parametrize(
    ("columns", "named"),
    [
        ({}, "nothing"),
        ({"prompt": "a", "chosen": "b"}, "chosen, prompt"),
        ({"prompt": "a", "answer": "b"}, "answer, prompt"),
        ({"prompt": "a", "first": "b", "second": "c"}, "first, prompt, second"),
        ({"prompt": "a", "completion": "b", "margin": "c"}, "completion, margin, prompt"),
    ],
)
def test_targets_that_make_no_record_are_an_error_that_lists_those_that_do(columns: dict[str, str], named: str) -> None:
    with pytest.raises(DataError, match=rf"^--map names {named}; .*chosen, prompt, rejected \(and margin, pref"):
        mapped(columns)


@pytest.mark.parametrize("columns", [{"prompt": ""}, {"prompt": "a+"}, {"text": "a+b"}])
def test_a_target_is_made_of_one_column_or_a_prompt_of_several(columns: dict[str, str]) -> None:
    with pytest.raises(DataError, match="wanted one column"):
        mapped(columns)


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ({"margin": "1.5"}, pair("Hi", "Hello.", "Go.", margin=1.5)),
        ({"margin": " ", "preference": "0.5"}, pair("Hi", "Hello.", "Go.", preference=0.5)),
        ({"margin": 2}, pair("Hi", "Hello.", "Go.", margin=2.0)),
        ({"margin": "much"}, ("wrong type", "margin")),
        ({"margin": True}, ("wrong type", "margin")),
        ({"margin": 10**400}, ("out of range", "margin")),
        ({"margin": "inf"}, ("out of range", "margin")),
        ({"preference": "2"}, ("out of range", "preference")),
        ({"chosen": None}, ("missing field", "chosen")),
    ],
)
def test_numbers_in_strings_are_numbers_and_bad_ones_are_unfit(cells: Row, expected: Expected) -> None:
    shape = mapped({target: target for target in ("prompt", "chosen", "rejected", "margin", "preference")})
    assert outcomes(shape, [{"prompt": "Hi", "chosen": "Hello.", "rejected": "Go.", **cells}]) == [expected]


@pytest.mark.parametrize(
    ("better", "expected"),
    [
        pytest.param(value, expected, id=repr(value))
        for expected, values in (("one", (0, "0", "a", 0.0)), ("two", (1, "1", "b", 1.0)))
        for value in values
    ],
)
def test_better_is_a_number_or_the_name_of_a_column(better: object, expected: str) -> None:
    shape = mapped({"prompt": "p", "first": "a", "second": "b", "better": "c"})
    (row,) = shape.convert({"p": "Hi", "a": "one", "b": "two", "c": better})
    assert row["chosen"] == expected


def test_better_as_true_is_unfit_since_it_could_mean_either() -> None:
    shape = mapped({"prompt": "p", "first": "a", "second": "b", "better": "c"})
    with pytest.raises(UnfitError):
        shape.convert({"p": "Hi", "a": "one", "b": "two", "c": True})


def test_a_deep_tree_is_no_recursion_error() -> None:
    replies = [{"role": "assistant", "text": text, "rank": rank} for rank, text in enumerate(("good", "bad"))]
    node: dict[str, object] = {"role": "prompter", "text": "last", "replies": replies}
    for depth in range(10_000):
        node = {"role": ("assistant", "prompter")[depth % 2], "text": "x", "replies": [node]}
    (row,) = SHAPES["oasst-trees"].convert({"message_tree_id": "1", "prompt": node})
    record = parse_row(row, "", "comparison")
    assert isinstance(record, Comparison)
    assert (len(record.prompt), record.chosen, record.rejected) == (10_001, "good", "bad")


@pytest.mark.parametrize("shape", ALL_SHAPES)
def test_a_shape_survives_pickling(shape: Shape) -> None:
    copy = pickle.loads(pickle.dumps(shape))
    rows = rows_of(shape)
    assert outcomes(copy, rows) == outcomes(shape, rows)
    assert [copy.matches(row) for row in rows] == [shape.matches(row) for row in rows]


def slow_hh_rlhf(side: str) -> tuple[list[Message], str]:
    """Line by line: a turn starts at a line that names its speaker after an empty line."""
    messages: list[Message] = []
    lines = side.split("\n")
    for before, line in zip(["x", *lines], lines, strict=False):
        speaker, colon, said = line.partition(":")
        if before == "" and colon and speaker in ("Human", "Assistant"):
            messages.append(Message("user" if speaker == "Human" else "assistant", said))
        elif messages:
            messages[-1] = Message(messages[-1].role, messages[-1].content + "\n" + line)
    stripped = [Message(message.role, message.content.strip()) for message in messages]
    return stripped[:-1], stripped[-1].content


def synthetic_transcripts(count: int) -> list[Row]:
    draw = random.Random(5)
    words = ["rain", "Human", "Assistant: no", "why?", "\n", "\n\n", "Human: x", "é", ":", " "]

    def said() -> str:
        return "so " + " ".join(draw.choices(words, k=draw.randint(1, 12)))

    rows: list[Row] = []
    for _ in range(count):
        turns = [f"\n\n{name}: {said()}" for _ in range(draw.randint(1, 4)) for name in ("Human", "Assistant")]
        start = "".join(turns[:-1])
        rows.append({"chosen": start + turns[-1], "rejected": f"{start}\n\nAssistant: {said()}"})
    return rows


def test_hh_rlhf_agrees_with_a_slow_loop_over_lines() -> None:
    for row in synthetic_transcripts(2000):
        (canonical,) = SHAPES["hh-rlhf"].convert(row)
        prompt, chosen = slow_hh_rlhf(str(row["chosen"]))
        assert canonical["prompt"] == [{"role": message.role, "content": message.content} for message in prompt]
        assert (canonical["chosen"], canonical["rejected"]) == (chosen, slow_hh_rlhf(str(row["rejected"]))[1])
