import pytest

from align.errors import DataError
from data.records import Comparison, Demonstration, Message, PlainText, Prompt, Record, Verdict
from data.splits import normalized_prompt, shared_prompts, split_by_prompt


def prompt(text: str, source: str = "f:1") -> Prompt:
    return Prompt((Message("user", text),), source)


PROMPTS = [prompt(f"Question {n}?", f"f:{n}") for n in range(1000)]


def test_a_split_keeps_every_record_once_in_order_and_about_the_fraction_asked_for() -> None:
    train, held_out = split_by_prompt(PROMPTS, held_out_fraction=0.1, seed=0)
    assert sorted([*train, *held_out], key=PROMPTS.index) == PROMPTS
    assert list(held_out) == [record for record in PROMPTS if record in held_out]
    assert 70 <= len(held_out) <= 130  # binomial: mean 100, standard deviation 9.5


def test_no_prompt_is_on_both_sides_however_it_is_written() -> None:
    shouted = [prompt(f"  QUESTION\n{n}？ ") for n in range(1000)]  # the full-width ? is the plain one in NFKC
    train, held_out = split_by_prompt([*PROMPTS, *shouted], held_out_fraction=0.3, seed=1)
    assert shared_prompts(train, held_out) == 0
    for side in (train, held_out):
        assert [record in side for record in PROMPTS] == [record in side for record in shouted]


def test_the_split_follows_the_seed_and_not_the_other_records() -> None:
    _, held_out = split_by_prompt(PROMPTS, held_out_fraction=0.2, seed=0)
    _, of_half = split_by_prompt(PROMPTS[:500], held_out_fraction=0.2, seed=0)
    _, other = split_by_prompt(PROMPTS, held_out_fraction=0.2, seed=1)
    assert list(of_half) == [record for record in PROMPTS[:500] if record in held_out]
    assert held_out != other


def test_a_prompt_is_held_out_of_every_stage_alike() -> None:
    turns = (Message("user", "Why?"),)
    kinds: list[Record] = [
        Prompt(turns, "f:1"),
        Prompt((Message("system", "Be brief."), *turns), "f:1"),
        Comparison(turns, "a", "b", "f:1"),
        Verdict(turns, "a", True, "f:1"),
        Demonstration((*turns, Message("assistant", "a"), *turns, Message("assistant", "b")), "f:1"),
    ]
    assert len({normalized_prompt(record) for record in kinds}) == 1
    assert normalized_prompt(PlainText("Why? ", "f:1")) == "why?"


def test_shared_prompts_counts_the_distinct_held_out_prompts_that_are_trained_on() -> None:
    held_out = [prompt("A"), prompt(" a"), prompt("b"), prompt("c")]
    assert shared_prompts([prompt("a"), prompt("B"), prompt("x")], held_out) == 2


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_a_split_with_an_empty_side_says_what_to_give(fraction: float) -> None:
    with pytest.raises(DataError, match="give held_out"):
        split_by_prompt(PROMPTS[:10], held_out_fraction=fraction, seed=0)


def test_case_is_left_out_in_every_script() -> None:
    assert normalized_prompt(prompt("Die STRASSE?")) == normalized_prompt(prompt("die Straße?"))
