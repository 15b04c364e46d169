"""The formulas of reward modelling."""

import torch
from torch import Tensor
from torch.nn import functional


def bradley_terry_loss(chosen_B: Tensor, rejected_B: Tensor, *, centering: float = 0.0) -> Tensor:
    """−log σ(r_c − r_r) + centering · (r_c + r_r)², averaged: () from scores (B,).

    Bradley & Terry 1952, as in Stiennon et al. 2020, eq. 1; the centring term is Eisenstein et al. 2023, sec. 2.
    TRL's RewardTrainer computes the same; this one is for held-out pairs and for its test.
    """
    assert chosen_B.shape == rejected_B.shape, (chosen_B.shape, rejected_B.shape)
    loss = -functional.logsigmoid(chosen_B - rejected_B).mean()
    return loss + centering * (chosen_B + rejected_B).square().mean()


def pair_accuracy(chosen_B: Tensor, rejected_B: Tensor) -> Tensor:
    """The share of pairs whose chosen response scores higher; an equal score counts half: () from (B,)."""
    assert chosen_B.shape == rejected_B.shape, (chosen_B.shape, rejected_B.shape)
    return ((chosen_B > rejected_B).float() + 0.5 * (chosen_B == rejected_B).float()).mean()


def length_rule_correct(chosen_lengths: list[int], rejected_lengths: list[int], *, longer_wins: bool) -> float:
    """How many pairs the rule "the longer (or shorter) response is better" gets right; equal lengths count half."""
    sign = 1 if longer_wins else -1
    differences = torch.tensor(chosen_lengths) - torch.tensor(rejected_lengths)
    return float((differences * sign > 0).sum()) + 0.5 * float((differences == 0).sum())
