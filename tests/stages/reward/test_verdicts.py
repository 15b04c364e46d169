import math

import pytest
import torch

from align.config import RewardObjectiveConfig
from align.errors import DataError
from stages.reward.batches import Collator
from stages.reward.evidence import Labels
from stages.reward.verdicts import Verdicts
from tests.stages.reward.said import verdict

UNPAIRED = RewardObjectiveConfig(kind="unpaired")
BOTH = [verdict(2, True), verdict(3, False)]


def test_a_batch_holds_one_sequence_a_verdict() -> None:
    rows = Verdicts.of(BOTH, BOTH, UNPAIRED).train_rows()
    batch = Collator(9)(rows)
    assert batch["input_ids"].tolist() == [[7, 7, 0, 1, 9], [7, 7, 0, 1, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert batch["labels"].tolist() == [1.0, 0.0]
    assert [row["length"] for row in rows] == [4, 5]


def test_classes_are_balanced_unless_a_weight_is_given() -> None:
    # one good, three bad: 4/2 = 2 and 4/6
    train = [verdict(2, True), *[verdict(3, False)] * 3]
    balanced = Verdicts.of(train, BOTH, UNPAIRED)
    assert (balanced.good_weight, balanced.bad_weight) == (2, pytest.approx(2 / 3))
    weighed = Verdicts.of(train, BOTH, RewardObjectiveConfig(kind="unpaired", positive_weight=5.0))
    assert (weighed.good_weight, weighed.bad_weight) == (5, 1)
    # scores 0: every row costs ln 2 by its weight
    labels = Labels(torch.tensor([1.0, 0.0]), torch.zeros(2))
    assert weighed.losses(torch.zeros(2), labels).tolist() == pytest.approx([5 * math.log(2), math.log(2)])


def test_the_report_says_which_side_of_0_and_in_which_order() -> None:
    rows = [verdict(1, True, "a:1"), verdict(9, True, "a:2"), verdict(2, False, "b:1"), verdict(9, False, "b:2")]
    # good 1 (right) and −1 (wrong), bad −2 (right) and 0 (half); in order: (1 > both, −1 > −2 alone): 3 of 4
    report = Verdicts.of(BOTH, rows, UNPAIRED).report(torch.tensor([1.0, -1.0, -2.0, 0.0]))
    assert report["accuracy"] == 0.625
    assert report["auc"] == 0.75
    assert report["margin"] == pytest.approx(0 - -1)
    assert report["held_out_verdicts"] == 4
    # "good unless longer than 2 tokens", from BOTH, is right, wrong, wrong, right
    assert report["length_baseline_accuracy"] == 0.5
    table = report["by_source"]
    assert isinstance(table, list)
    assert [(row["bucket"], row["verdicts"], row["accuracy"]) for row in table] == [("a", 2, 0.5), ("b", 2, 0.75)]


def test_the_held_out_loss_has_the_weights_of_the_train_set_and_no_centring() -> None:
    train = [verdict(2, True), *[verdict(3, False)] * 3]
    rows = Verdicts.of(train, BOTH, UNPAIRED)
    # σ(ln 3) = 3/4: good 2·−ln(3/4), bad 2/3·−ln(1/4)
    expected = (-2 * math.log(3 / 4) - 2 / 3 * math.log(1 / 4)) / 2
    assert rows.held_out_loss(torch.full((2,), math.log(3))) == pytest.approx(expected)


def test_a_step_logs_its_accuracy() -> None:
    seen = Verdicts.of(BOTH, BOTH, UNPAIRED).seen(torch.tensor([1.0, 2.0]), Labels(torch.ones(2), torch.zeros(2)))
    assert seen == {"accuracy": 1.0}


@pytest.mark.parametrize(("is_good", "said"), [(True, "true"), (False, "false")])
def test_verdicts_that_are_all_the_same_are_refused(is_good: bool, said: str) -> None:
    same = [verdict(2, is_good)] * 3
    with pytest.raises(DataError, match=f"data.reward.train: all 3 labels are {said}"):
        Verdicts.of(same, BOTH, UNPAIRED)
    with pytest.raises(DataError, match=f"data.reward.held_out: all 3 labels are {said}"):
        Verdicts.of(BOTH, same, UNPAIRED)
