"""Intervals for the numbers that a report shows."""

import math

import numpy as np


def wilson_interval(successes: float, total: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927): stays inside [0, 1] and is right for small samples."""
    share = successes / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap_interval(means: list[float], *, seed: int, resamples: int = 10_000) -> tuple[float, float]:
    """95 % percentile interval of the mean (Efron 1979), drawing whole clusters again.

    Args:
        means: one mean a cluster (a prompt: its answers depend on one another).
    """
    values = np.asarray(means)
    draws = np.random.Generator(np.random.Philox(seed)).integers(0, len(values), size=(resamples, len(values)))
    low, high = np.quantile(values[draws].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)
