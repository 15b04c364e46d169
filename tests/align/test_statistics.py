import numpy as np
import pytest

from align.statistics import bootstrap_interval, wilson_interval


@pytest.mark.parametrize(
    ("successes", "total", "low", "high"),
    [
        # z² = 3.8415. 8 of 10: centre (0.8 + 0.19207)/1.38415 = 0.71674, half 0.22654
        (8, 10, 0.4902, 0.9433),
        (0, 10, 0.0, 0.2775),  # z²/(n + z²)
        (10, 10, 0.7225, 1.0),
        (50, 100, 0.4038, 0.5962),
    ],
)
def test_the_wilson_interval_of_known_counts(successes: float, total: int, low: float, high: float) -> None:
    assert wilson_interval(successes, total) == pytest.approx((low, high), abs=5e-5)


def test_the_bootstrap_interval_of_many_values_is_that_of_the_normal_distribution() -> None:
    values = np.random.default_rng(0).normal(3, 2, size=400)
    low, high = bootstrap_interval(values.tolist(), seed=1)
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_the_bootstrap_interval_of_two_clusters_is_both() -> None:
    # means of two draws are 0, ½, 1 with probabilities ¼, ½, ¼
    assert bootstrap_interval([0.0, 1.0], seed=0) == (0.0, 1.0)


def test_the_bootstrap_interval_is_a_function_of_its_seed() -> None:
    values = [0.1, 0.5, 0.2, 0.9, 0.4]
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    assert bootstrap_interval(values, seed=3, resamples=100) != bootstrap_interval(values, seed=4, resamples=100)
    assert bootstrap_interval([0.7] * 5, seed=0) == pytest.approx((0.7, 0.7))
