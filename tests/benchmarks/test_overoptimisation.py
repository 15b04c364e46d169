"""What the over-optimisation benchmark says of looks whose answers are known."""

import pytest

from tests.benchmarks.overoptimisation import Point, Turn
from tests.benchmarks.overoptimisation_looks import SAMPLES, Look

PROMPTS = 8


def look(update: int, gold: float, score: float, kl: float = 4.0) -> Look:
    """Answers that differ between prompts, and whose means are those given."""
    spread = [((i // SAMPLES) % 2 - 0.5) * 0.1 for i in range(PROMPTS * SAMPLES)]
    count = len(spread)
    return Look(update, [gold + s for s in spread], [score + s for s in spread], [kl] * count, ["text"] * count)


def test_gold_that_falls_while_the_score_rises_is_over_optimisation() -> None:
    turn = Turn.of([look(0, 0.1, 0.0), look(4, 0.6, 1.0), look(8, 0.2, 2.0)])
    assert (turn.peak, turn.last) == (4, 8)
    assert turn.gold.mean == pytest.approx(-0.4)
    assert turn.score.mean == pytest.approx(1.0)
    assert turn.is_overoptimised


@pytest.mark.parametrize(
    ("gold", "score"), [(0.7, 2.0), (0.2, 0.5)], ids=["gold still rises", "the score has fallen, too"]
)
def test_anything_else_is_not(gold: float, score: float) -> None:
    assert not Turn.of([look(0, 0.1, 0.0), look(4, 0.6, 1.0), look(8, gold, score)]).is_overoptimised


def test_a_point_is_drawn_at_the_root_of_the_kl_which_an_estimate_below_zero_does_not_break() -> None:
    assert Point.of(look(4, 0.6, 1.0, kl=9.0)).root_kl == pytest.approx(3.0)
    assert Point.of(look(0, 0.1, 0.0, kl=-0.01)).root_kl == 0.0
