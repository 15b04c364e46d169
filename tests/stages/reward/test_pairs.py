import math

import pytest
import torch

from align.config import RewardObjectiveConfig
from align.errors import DataError
from data.tokenization import TokenizedComparison
from stages.reward import objective
from stages.reward.batches import Collator
from stages.reward.evidence import Labels
from stages.reward.pairs import Pairs
from tests.stages.reward.said import pair

BRADLEY_TERRY, RAO_KUPPER = RewardObjectiveConfig(), RewardObjectiveConfig(kind="rao-kupper", tie_threshold=2.0)


def held_out(*rows: TokenizedComparison, settings: RewardObjectiveConfig = BRADLEY_TERRY) -> Pairs:
    return Pairs.of([pair()], rows, settings)


def test_a_batch_holds_the_chosen_rows_then_the_rejected_with_what_was_said() -> None:
    rows = Pairs.of([pair(3, 1, margin=2.0), pair(1, 2, preference=0.25)], [pair()], BRADLEY_TERRY).train_rows()
    assert [row["length"] for row in rows] == [6, 5]
    batch = Collator(9)(rows)
    assert batch["input_ids"].tolist() == [[7, 7, 0, 1, 2], [7, 7, 0, 9, 9], [7, 7, 0, 9, 9], [7, 7, 0, 1, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]
    assert batch["labels"].tolist() == [1.0, 0.25]
    assert batch["margin"].tolist() == [2.0, 0.0]


def test_the_objective_that_was_asked_for_is_the_one_that_is_learnt() -> None:
    scores_N = torch.tensor([1.0, 0.0, 0.5, 2.0])  # chosen 1, 0; rejected 0.5, 2
    labels = Labels(torch.tensor([1.0, 0.5]), torch.tensor([0.3, 0.0]))
    chosen_B, rejected_B = scores_N[:2], scores_N[2:]
    expected = objective.bradley_terry_losses(
        chosen_B, rejected_B, preference_B=labels.probability_B, margin_B=labels.margin_B
    )
    torch.testing.assert_close(held_out(pair()).losses(scores_N, labels), expected)
    ties = held_out(pair(), settings=RAO_KUPPER)
    expected = objective.rao_kupper_losses(chosen_B, rejected_B, preference_B=labels.probability_B, tie_threshold=2.0)
    torch.testing.assert_close(ties.losses(scores_N, labels), expected)
    assert [side.tolist() for side in ties.sides(scores_N)] == [[1.0, 0.0], [0.5, 2.0]]


def test_a_pair_is_right_where_the_scores_agree_with_what_was_preferred_and_a_tie_counts_not() -> None:
    rows = [pair(), pair(preference=0.2), pair(preference=0.5), pair(preference=0.9), pair(preference=0)]
    # d = 1 right, 1 wrong (the other was preferred), tie, −2 wrong, −3 right
    scores_N = torch.tensor([1.0, 1.0, 9.0, 0.0, 0.0, 0.0, 0.0, 0.0, 2.0, 3.0])
    report = held_out(*rows).report(scores_N)
    assert report["accuracy"] == 0.5
    assert report["margin"] == pytest.approx((1 - 1 - 2 + 3) / 4)
    assert report["held_out_pairs"] == 5
    seen = held_out(pair()).seen(scores_N, Labels(torch.tensor([1.0, 0.2, 0.5, 0.9, 0.0]), torch.zeros(5)))
    assert seen == {"accuracy": 0.5, "margin": pytest.approx(0.25)}
    assert held_out(pair()).seen(torch.ones(2), Labels(torch.tensor([0.5]), torch.zeros(1))) == {}


def test_the_held_out_loss_counts_ties_and_margins_and_leaves_centring_out() -> None:
    # d = ln 3 at margin ln 3: ln 2; a tie at d = ln 3 under Bradley-Terry: −(ln(3/4) + ln(1/4)) / 2
    rows = held_out(pair(margin=math.log(3)), pair(preference=0.5))
    scores_N = torch.tensor([math.log(3), math.log(3), 0.0, 0.0])
    expected = (math.log(2) - (math.log(3 / 4) + math.log(1 / 4)) / 2) / 2
    assert rows.held_out_loss(scores_N) == pytest.approx(expected)
    assert rows.report(scores_N)["loss"] == pytest.approx(expected)


def test_the_report_has_the_accuracy_by_source_by_margin_and_by_difference_in_length() -> None:
    rows = [
        pair(5, 5, source="a.jsonl:1"),
        pair(5, 1, source="a.jsonl:2"),
        pair(1, 40, source="b.jsonl:1"),
        pair(1, 30, preference=0.0, source="b.jsonl:2"),
        pair(9, 1, preference=0.5, source="c.jsonl:1"),
    ]
    # d = 0.1 right, 0.2 right, −0.3 wrong, −0.4 right; the tie is in no bucket
    scores_N = torch.tensor([0.1, 0.2, -0.3, -0.4, 5.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    report = held_out(*rows).report(scores_N)

    def told(name: str) -> list[tuple[object, ...]]:
        table = report[name]
        assert isinstance(table, list)
        return [(row["bucket"], row["pairs"], row["accuracy"]) for row in table]

    assert told("by_source") == [("a.jsonl", 2, 1.0), ("b.jsonl", 2, 0.5)]
    assert told("by_margin") == [
        ("q1: to 0.1", 1, 1.0), ("q2: to 0.2", 1, 1.0), ("q3: to 0.3", 1, 0.0), ("q4: to 0.4", 1, 1.0)
    ]  # fmt: skip
    assert told("by_length_difference") == [("0", 1, 1.0), ("1–8", 1, 1.0), ("9–32", 1, 1.0), ("33+", 1, 0.0)]


def test_the_length_rule_takes_its_direction_from_the_better_responses_of_the_train_set() -> None:
    # In training the shorter was preferred: once said as chosen, once by a preference below 1/2; a tie says nothing
    train = [pair(1, 5), pair(6, 2, preference=0.1), pair(1, 9, preference=0.5)]
    report = Pairs.of(train, [pair(2, 4), pair(4, 2), pair(3, 3)], BRADLEY_TERRY).report(torch.zeros(6))
    assert report["length_baseline_accuracy"] == 0.5  # right, wrong, equal
    report = Pairs.of(train, [pair(2, 4), pair(4, 2, preference=0)], BRADLEY_TERRY).report(torch.zeros(4))
    assert report["length_baseline_accuracy"] == 1


def test_pairs_that_decide_nothing_are_refused() -> None:
    ties = [pair(preference=0.5)] * 3
    with pytest.raises(DataError, match=r"data.reward.held_out: all 3 pairs are ties"):
        Pairs.of([pair()], ties, RAO_KUPPER)
    with pytest.raises(DataError, match=r"data.reward.train: all 3 pairs are ties"):
        Pairs.of(ties, [pair()], BRADLEY_TERRY)


def test_a_margin_has_no_place_in_rao_and_kupper() -> None:
    with pytest.raises(DataError, match=r"1 pairs have a margin, which reward\.objective\.kind rao-kupper"):
        Pairs.of([pair(margin=1.0), pair(margin=0.0)], [pair()], RAO_KUPPER)
    assert Pairs.of([pair(margin=0.0)], [pair()], RAO_KUPPER).tie_threshold == 2.0
    assert Pairs.of([pair(margin=1.0)], [pair()], BRADLEY_TERRY).tie_threshold is None
