"""The formulas of reward modelling. Losses come a row, (B,), so that whoever adds them up decides what a row counts."""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def bradley_terry_losses(chosen_B: Tensor, rejected_B: Tensor, *, preference_B: Tensor, margin_B: Tensor) -> Tensor:
    """−p·log σ(d − m) − (1 − p)·log σ(−d − m), d = r_c − r_r: (B,) from scores, preferences and margins (B,).

    Bradley & Terry 1952. With p = 1 it is Touvron et al. 2023 (Llama 2), eq. 2, and with m = 0 too Stiennon et al.
    2020, eq. 1; with m = 0 and p in [0, 1] the cross-entropy of Christiano et al. 2017, sec. 2.2.3, where a tie is
    p = 1/2. Departure: none; rows with m > 0 and p < 1, for which no source has a formula, are refused when read.
    """
    assert chosen_B.shape == rejected_B.shape == preference_B.shape == margin_B.shape, (chosen_B.shape, margin_B.shape)
    difference_B = chosen_B - rejected_B
    wins_B = logsigmoid(difference_B - margin_B)
    return -(preference_B * wins_B + (1 - preference_B) * logsigmoid(-difference_B - margin_B))


def rao_kupper_log_probabilities(
    chosen_B: Tensor, rejected_B: Tensor, *, tie_threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(log P(c > r), log P(tie), log P(r > c)), each (B,), from scores (B,); θ > 1 is the tie threshold.

    P(c > r) = σ(d − ln θ), P(r > c) = σ(−d − ln θ), P(tie) = (θ² − 1)·P(c > r)·P(r > c), d = r_c − r_r: Rao & Kupper
    1967, for language models Liu et al. 2024 (Reward Learning From Preference With Ties). Written as a product, the
    tie has no difference of nearly equal numbers, and no overflow at large |d|.
    """
    assert chosen_B.shape == rejected_B.shape, (chosen_B.shape, rejected_B.shape)
    difference_B = chosen_B - rejected_B
    wins_B = logsigmoid(difference_B - math.log(tie_threshold))
    loses_B = logsigmoid(-difference_B - math.log(tie_threshold))
    return wins_B, math.log(tie_threshold - 1) + math.log(tie_threshold + 1) + wins_B + loses_B, loses_B


def rao_kupper_losses(chosen_B: Tensor, rejected_B: Tensor, *, preference_B: Tensor, tie_threshold: float) -> Tensor:
    """−log P(tie) where p = 1/2, else −p·log P(c > r) − (1 − p)·log P(r > c): (B,) from scores and preferences (B,).

    Rao & Kupper 1967. Departure: theirs has p in {0, 1/2, 1}; other p mix the two wins as Christiano et al. 2017 do.
    """
    assert chosen_B.shape == rejected_B.shape == preference_B.shape, (chosen_B.shape, preference_B.shape)
    wins_B, ties_B, loses_B = rao_kupper_log_probabilities(chosen_B, rejected_B, tie_threshold=tie_threshold)
    return -torch.where(preference_B == 0.5, ties_B, preference_B * wins_B + (1 - preference_B) * loses_B)


def verdict_losses(scores_B: Tensor, *, is_good_B: Tensor, good_weight: float, bad_weight: float) -> Tensor:
    """−w_g·y·log σ(r) − w_b·(1 − y)·log σ(−r), y = 1 where good: (B,) from scores and verdicts (B,).

    Logistic regression on whether a response keeps the norms, as the rule reward model of Glaese et al. 2022
    (Sparrow); weighted by class as King & Zeng 2001, sec. 4.2.
    """
    assert scores_B.shape == is_good_B.shape, (scores_B.shape, is_good_B.shape)
    return -torch.where(is_good_B > 0, good_weight * logsigmoid(scores_B), bad_weight * logsigmoid(-scores_B))


def balanced_weights(num_good: int, num_bad: int) -> tuple[float, float]:
    """(n / 2 n_good, n / 2 n_bad): both classes weigh the same in all, and a row 1 on average.

    King & Zeng 2001, sec. 4.2, for a population in which half are good.
    """
    assert num_good > 0, "no good rows"
    assert num_bad > 0, "no bad rows"
    total = num_good + num_bad
    return total / (2 * num_good), total / (2 * num_bad)


def centering_penalties(scores: tuple[Tensor, ...]) -> Tensor:
    """(Σ r)² over a row's scores, (B,) each: (r_c + r_r)² of a pair, r² of a lone response: (B,).

    Eisenstein et al. 2023, sec. 2: a Bradley-Terry loss leaves a constant free, and this settles it near 0.
    Departure: for a lone response they have nothing; there it holds back scores that are sure of themselves.
    """
    assert all(score_B.shape == scores[0].shape for score_B in scores), [score_B.shape for score_B in scores]
    return torch.stack(scores).sum(0).square()


def shares_right(better_B: Tensor, worse_B: Tensor) -> Tensor:
    """1 where the better one scores higher, 0 where lower, 1/2 where equal: (B,) from (B,)."""
    assert better_B.shape == worse_B.shape, (better_B.shape, worse_B.shape)
    return (better_B > worse_B).float() + 0.5 * (better_B == worse_B).float()


def area_under_curve(good_G: Tensor, bad_B: Tensor) -> Tensor:
    """P(a good response scores higher than a bad one), an equal score counting half: () from (G,) and (B,).

    The area under the ROC curve as Mann & Whitney's U / (G·B) (Hanley & McNeil 1982), from ranks, not from G·B pairs.
    """
    assert good_G.ndim == bad_B.ndim == 1, (good_G.shape, bad_B.shape)
    sorted_B = bad_B.sort().values
    below_G = torch.searchsorted(sorted_B, good_G, right=False)
    up_to_G = torch.searchsorted(sorted_B, good_G, right=True)
    return (below_G + up_to_G).double().mean() / (2 * len(bad_B))


def ensemble_scores(scores_KN: Tensor, spread_K: Tensor) -> Tensor:
    """The mean over K members of r / s, s the member's own spread: (N,) from (K, N) and (K,).

    Mean aggregation of Coste et al. 2023 and Eisenstein et al. 2023. Departure: in units of each member's spread,
    since nothing ties their scales together; their means are left in, which cancel in a pair, and would move the 0
    that a verdict is read by.
    """
    assert scores_KN.shape[:1] == spread_K.shape, (scores_KN.shape, spread_K.shape)
    return (scores_KN / spread_K[:, None]).mean(0)


def length_rule_right(better_lengths_B: Tensor, worse_lengths_B: Tensor, *, longer_wins: bool) -> Tensor:
    """What the rule "the longer (or shorter) response is better" gets right, equal lengths half: (B,) from (B,)."""
    assert better_lengths_B.shape == worse_lengths_B.shape, (better_lengths_B.shape, worse_lengths_B.shape)
    sign = 1 if longer_wins else -1
    return shares_right(sign * better_lengths_B, sign * worse_lengths_B)


def best_length_rule(lengths: list[int], is_good: list[bool]) -> tuple[int, bool]:
    """(t, longer_is_good): the rule "good if longer than t tokens", or "good if not", that is right most often.

    t = −1 calls all alike. Of equally good rules the one with the smallest t, longer_is_good first.
    """
    assert len(lengths) == len(is_good), (len(lengths), len(is_good))
    thresholds_T = torch.tensor(sorted({-1, *lengths}))
    predicted_TB = torch.tensor(lengths)[None] > thresholds_T[:, None]
    right_T = (predicted_TB == torch.tensor(is_good)[None]).sum(1)
    wrong_T = len(lengths) - right_T
    best = int(torch.maximum(right_T, wrong_T).argmax())
    return int(thresholds_T[best]), bool(right_T[best] >= wrong_T[best])
