"""Accuracies for people: with their intervals, whole and by bucket."""

from collections.abc import Sequence

import torch
from torch import Tensor

from align.statistics import wilson_interval

LENGTH_BUCKETS = ("0", "1–8", "9–32", "33+")  # tokens
_LENGTH_EDGES = (0, 8, 32)  # the last of each bucket but the last


def accuracy(right_B: Tensor, *, prefix: str = "") -> dict[str, object]:
    """The share that is right and its 95 % Wilson interval, from 1, 1/2 or 0 a row: (B,)."""
    assert right_B.ndim == 1, right_B.shape
    total, right = len(right_B), float(right_B.sum())
    interval = list(wilson_interval(right, total))
    return {f"{prefix}accuracy": right / total, f"{prefix or 'accuracy_'}ci95": interval}


def by_bucket(
    buckets: Sequence[str], right_B: Tensor, *, unit: str, order: Sequence[str] = ()
) -> list[dict[str, object]]:
    """The accuracy in each bucket that has rows, in `order` or by name; `unit` names the count of its rows."""
    assert right_B.shape == (len(buckets),), (right_B.shape, len(buckets))
    rows: dict[str, list[int]] = {}
    for row, bucket in enumerate(buckets):
        rows.setdefault(bucket, []).append(row)
    return [
        {"bucket": bucket, unit: len(own), **accuracy(right_B[own])}
        for bucket in order or sorted(rows)
        if (own := rows.get(bucket))
    ]


def by_source(sources: Sequence[str], right_B: Tensor, *, unit: str) -> list[dict[str, object]]:
    """By what stands before the last colon of a record's source: its file, or its hub data set and split."""
    return by_bucket([source.rpartition(":")[0] or source for source in sources], right_B, unit=unit)


def quarters(values_B: Tensor) -> list[str]:
    """Which quarter of the rows each is in, from the smallest value to the largest, and how far that quarter goes.

    By rank, equal values in the order given: so the quarters differ by one row at most.
    """
    order = values_B.sort(stable=True).indices.tolist()
    quarter = {row: 4 * rank // len(order) for rank, row in enumerate(order)}
    most = {number: values_B[row].item() for row, number in quarter.items()}  # in order of rank: the last one stays
    return [f"q{quarter[row] + 1}: to {most[quarter[row]]:.3g}" for row in range(len(order))]


def length_buckets(differences_B: Tensor) -> list[str]:
    """LENGTH_BUCKETS of differences in length, in tokens."""
    return [LENGTH_BUCKETS[number] for number in torch.bucketize(differences_B, torch.tensor(_LENGTH_EDGES)).tolist()]
