import pytest
import torch

from align.statistics import wilson_interval
from stages.reward.report import LENGTH_BUCKETS, accuracy, by_bucket, by_source, length_buckets, quarters


def test_an_accuracy_comes_with_its_wilson_interval() -> None:
    # 1 + 0.5 + 0 + 1 of 4
    right_B = torch.tensor([1.0, 0.5, 0.0, 1.0])
    assert accuracy(right_B) == {"accuracy": 0.625, "accuracy_ci95": list(wilson_interval(2.5, 4))}
    assert set(accuracy(right_B, prefix="length_baseline_")) == {"length_baseline_accuracy", "length_baseline_ci95"}


def test_buckets_hold_every_row_once_and_come_in_order() -> None:
    right_B = torch.tensor([1.0, 0.0, 1.0, 0.5])
    found = by_bucket(["b", "a", "b", "a"], right_B, unit="pairs")
    assert [(row["bucket"], row["pairs"], row["accuracy"]) for row in found] == [("a", 2, 0.25), ("b", 2, 1.0)]
    assert found[0]["accuracy_ci95"] == list(wilson_interval(0.5, 2))
    given = by_bucket(["b", "a", "b", "a"], right_B, unit="rows", order=("c", "b", "a"))
    assert [(row["bucket"], row["rows"]) for row in given] == [("b", 2), ("a", 2)]  # and none for an empty bucket


def test_a_source_is_what_stands_before_the_line_number() -> None:
    sources = ["C:/x.jsonl:12", "x.parquet:row 3", "hub/set/train:row 1", "C:/x.jsonl:9", "bare"]
    found = by_source(sources, torch.ones(5), unit="pairs")
    assert [(row["bucket"], row["pairs"]) for row in found] == [
        ("C:/x.jsonl", 2),
        ("bare", 1),
        ("hub/set/train", 1),
        ("x.parquet", 1),
    ]


def test_differences_in_length_fall_into_their_buckets() -> None:
    differences = torch.tensor([0, 1, 8, 9, 32, 33, 500])
    assert length_buckets(differences) == ["0", "1–8", "1–8", "9–32", "9–32", "33+", "33+"]
    assert set(length_buckets(differences)) == set(LENGTH_BUCKETS)


def test_quarters_are_by_rank_and_say_how_far_they_go() -> None:
    # sorted: 0.1 0.2 | 0.3 0.4 | 0.5 0.6 | 0.7 0.8
    values = torch.tensor([0.8, 0.1, 0.7, 0.2, 0.6, 0.3, 0.5, 0.4])
    assert quarters(values) == [
        "q4: to 0.8", "q1: to 0.2", "q4: to 0.8", "q1: to 0.2", "q3: to 0.6", "q2: to 0.4", "q3: to 0.6", "q2: to 0.4"
    ]  # fmt: skip


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6, 7, 41])
def test_quarters_differ_by_one_row_at_most_whatever_the_ties(count: int) -> None:
    for values in (torch.zeros(count), torch.arange(count).float()):
        names = quarters(values)
        sizes = [names.count(name) for name in sorted(set(names))]
        assert sum(sizes) == count
        assert max(sizes) - min(sizes) <= 1
        assert len(sizes) == min(count, 4)
