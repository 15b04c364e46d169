import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from trl.trainer.reward_trainer import RewardTrainer

from stages.reward import objective


def test_the_loss_of_one_pair() -> None:
    # r_c − r_r = ln 3: σ = 3/4, −ln 0.75; centring 0.1 · (ln 3 + 0)²
    chosen_B, rejected_B = torch.tensor([math.log(3)]), torch.tensor([0.0])
    assert objective.bradley_terry_loss(chosen_B, rejected_B).item() == pytest.approx(-math.log(0.75))
    centred = objective.bradley_terry_loss(chosen_B, rejected_B, centering=0.1).item()
    assert centred == pytest.approx(-math.log(0.75) + 0.1 * math.log(3) ** 2)


def test_equal_scores_cost_ln_2_and_push_the_pair_apart() -> None:
    chosen_B, rejected_B = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    loss = objective.bradley_terry_loss(chosen_B, rejected_B)
    assert loss.item() == pytest.approx(math.log(2))
    loss.backward()
    assert chosen_B.grad is not None
    assert rejected_B.grad is not None
    assert chosen_B.grad.tolist() == [-0.25, -0.25]  # −(1 − σ(0)) / 2 pairs
    assert rejected_B.grad.tolist() == [0.25, 0.25]


def test_a_large_margin_either_way_is_finite() -> None:
    far = torch.tensor([1e4, -1e4])
    assert objective.bradley_terry_loss(far, -far).item() == pytest.approx(1e4)  # 0 and 2·10⁴, averaged


def test_trl_trains_on_the_same_formula() -> None:
    scores = torch.randn(6, generator=torch.Generator().manual_seed(0))
    # compute_loss called on as much of a trainer as it looks at, in eval mode
    same = lambda value: value  # noqa: E731
    trainer = SimpleNamespace(
        args=SimpleNamespace(center_rewards_coefficient=0.3),
        accelerator=SimpleNamespace(gather=same, gather_for_metrics=same),
        model=SimpleNamespace(training=False),
        _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
    )
    model = lambda **_: SimpleNamespace(logits=scores[:, None])  # noqa: E731
    inputs = {"input_ids": torch.ones(6, 2, dtype=torch.long), "attention_mask": torch.ones(6, 2, dtype=torch.long)}
    theirs = RewardTrainer.compute_loss(trainer, model, inputs)  # type: ignore[arg-type]
    ours = objective.bradley_terry_loss(scores[:3], scores[3:], centering=0.3)
    torch.testing.assert_close(theirs, ours)


def test_an_equal_score_counts_half() -> None:
    # right, wrong, tie, right: 2.5 of 4
    accuracy = objective.pair_accuracy(torch.tensor([2.0, 0.0, 1.0, 5.0]), torch.tensor([1.0, 1.0, 1.0, 4.0]))
    assert accuracy.item() == 0.625


def test_the_length_rule_counts_right_pairs_and_half_of_equal_lengths() -> None:
    # longer wins: 5 > 3 yes, 2 > 4 no, 3 = 3 half, 9 > 1 yes
    chosen, rejected = [5, 2, 3, 9], [3, 4, 3, 1]
    assert objective.length_rule_correct(chosen, rejected, longer_wins=True) == 2.5
    assert objective.length_rule_correct(chosen, rejected, longer_wins=False) == 1.5
