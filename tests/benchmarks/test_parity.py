"""What the parity benchmarks compute with: if these were wrong, so would be their verdicts."""

import random

import pytest

from tests.benchmarks.intervals import difference_interval, mean_interval, t_quantile
from tests.benchmarks.learning_parity import MARGIN, Run, compare, reward_at_kl
from tests.benchmarks.parity_evaluation import Outcome
from tests.benchmarks.parity_recipe import Point
from tests.benchmarks.parity_task import BRIGHT, WANTED, answer, make_tokenizer, prompts, reward, row_scorer


def line(slope: float, updates: int = 21) -> list[Point]:
    """A learning curve whose KL grows by one an update, and whose reward is slope × KL."""
    return [Point(64 * (i + 1), slope * i, float(i)) for i in range(updates)]


def runs(rewards: list[float]) -> list[Run]:
    return [Run(Outcome(reward, kl=10.0, eos_rate=1.0, length=9.0), line(reward / 10)) for reward in rewards]


@pytest.mark.parametrize(("freedom", "expected"), [(1, 12.706), (9, 2.262), (18, 2.101), (1000, 1.962)])
def test_quantiles_of_student_are_those_of_the_tables(freedom: int, expected: float) -> None:
    assert t_quantile(freedom) == pytest.approx(expected, abs=5e-4)


def test_the_interval_of_a_mean_is_worked_by_hand() -> None:
    interval = mean_interval([1.0, 2.0, 3.0])  # standard error √(1/3), t(2) = 4.3027
    assert interval.mean == pytest.approx(2.0)
    assert interval.high - interval.low == pytest.approx(2 * 4.3027 / 3**0.5, abs=1e-3)


def test_a_difference_of_equal_spreads_has_twice_the_freedom() -> None:
    interval = difference_interval([1.0, 2.0, 3.0], [4.0, 5.0, 6.0])  # standard error √(2/3), t(4) = 2.7764
    assert interval.mean == pytest.approx(-3.0)
    assert interval.high == pytest.approx(-3.0 + 2.7764 * (2 / 3) ** 0.5, abs=1e-3)


def test_the_reward_at_a_kl_lies_on_the_curve() -> None:
    assert reward_at_kl(line(0.1), 7.25) == pytest.approx(0.725)
    assert reward_at_kl(line(0.1), 99.0) == pytest.approx(0.1 * 19)  # the last, smoothed: the mean of 18, 19 and 20


def test_the_verdict_falls_where_the_interval_reaches_below_the_margin() -> None:
    theirs = runs([0.50, 0.51, 0.49])
    assert compare(runs([0.49, 0.50, 0.48]), theirs).held
    assert not compare(runs([0.50 - MARGIN, 0.51 - MARGIN, 0.49 - MARGIN]), theirs).held


def test_the_reward_counts_different_bright_words() -> None:
    assert reward("", "the cold lamp sees") == 0.0
    assert reward("", " ".join([BRIGHT[0]] * 9)) == pytest.approx(1 / WANTED)
    assert reward("", " ".join(BRIGHT)) == 1.0


def test_a_row_is_scored_by_its_response_alone() -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer("<user> about golden lamp <assistant> a happy lamp <end>")["input_ids"]
    assert isinstance(ids, list)
    assert row_scorer(tokenizer)(ids) == pytest.approx(1 / WANTED)


def test_every_word_of_the_language_is_a_token_and_no_prompt_is_on_both_sides() -> None:
    tokenizer, (trained_on, held_out) = make_tokenizer(), prompts()
    assert set(trained_on).isdisjoint(held_out)
    draw = random.Random(0)
    texts = [f"<user> {prompt} <assistant> {answer(draw, prompt)} <end>" for prompt in held_out]
    unknown = tokenizer.convert_tokens_to_ids("<unk>")
    assert all(unknown not in tokenizer(text)["input_ids"] for text in texts)
