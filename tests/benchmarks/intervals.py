"""95 % intervals over few seeds: Student's t, and Welch's for a difference."""

from dataclasses import dataclass
from math import exp, lgamma, log, pi, sqrt
from statistics import fmean, variance


@dataclass(frozen=True)
class Interval:
    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def mean_interval(values: list[float]) -> Interval:
    half = t_quantile(len(values) - 1) * sqrt(variance(values) / len(values))
    return Interval(fmean(values), fmean(values) - half, fmean(values) + half)


def difference_interval(first: list[float], second: list[float]) -> Interval:
    """Of mean(first) − mean(second), with unequal variances (Welch 1947)."""
    a, b = variance(first) / len(first), variance(second) / len(second)
    freedom = (a + b) ** 2 / (a * a / (len(first) - 1) + b * b / (len(second) - 1)) if a + b else 1.0
    half = t_quantile(freedom) * sqrt(a + b)
    mean = fmean(first) - fmean(second)
    return Interval(mean, mean - half, mean + half)


def t_quantile(freedom: float, share: float = 0.975) -> float:
    """By bisection of the distribution function, which Simpson's rule gives well enough."""
    scale = exp(lgamma((freedom + 1) / 2) - lgamma(freedom / 2) - 0.5 * log(freedom * pi))

    def density(x: float) -> float:
        return scale * (1 + x * x / freedom) ** (-(freedom + 1) / 2)

    def below(x: float, steps: int = 2000) -> float:
        h = x / steps
        inner = sum((4 if i % 2 else 2) * density(i * h) for i in range(1, steps))
        return 0.5 + h / 3 * (density(0.0) + inner + density(x))

    low, high = 0.0, 50.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) < share else (low, middle)
    return (low + high) / 2
