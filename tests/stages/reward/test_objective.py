import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stages.reward import objective

FAR = (-1e4, -300.0, -40.0, 40.0, 300.0, 1e4)


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def drawn(count: int, seed: int) -> Tensor:
    return 3 * torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def bradley_terry(chosen: Tensor, rejected: Tensor, *, p: Tensor | None = None, m: Tensor | None = None) -> Tensor:
    ones, zeros = torch.ones_like(chosen), torch.zeros_like(chosen)
    return objective.bradley_terry_losses(
        chosen, rejected, preference_B=ones if p is None else p, margin_B=zeros if m is None else m
    )


def rao_kupper(chosen: Tensor, rejected: Tensor, p: Tensor, theta: float) -> Tensor:
    return objective.rao_kupper_losses(chosen, rejected, preference_B=p, tie_threshold=theta)


def test_the_bradley_terry_loss_by_hand() -> None:
    # d = ln 3: σ(d) = 3/4, σ(−d) = 1/4. With margin ln 3 the pair is at σ(0) = 1/2.
    # p = 0.8: −0.8·ln(3/4) − 0.2·ln(1/4); p = 0: −ln(1/4)
    d, zero = tensor(*[math.log(3)] * 4), tensor(0, 0, 0, 0)
    losses = bradley_terry(d, zero, p=tensor(1, 1, 0.8, 0), m=tensor(0, math.log(3), 0, 0))
    expected = [-math.log(3 / 4), math.log(2), -0.8 * math.log(3 / 4) - 0.2 * math.log(1 / 4), -math.log(1 / 4)]
    assert losses.tolist() == pytest.approx(expected)


def test_equal_scores_cost_ln_2_and_push_the_pair_apart() -> None:
    chosen_B, rejected_B = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    losses_B = bradley_terry(chosen_B, rejected_B)
    assert losses_B.tolist() == pytest.approx([math.log(2)] * 2)
    losses_B.mean().backward()
    assert chosen_B.grad is not None
    assert rejected_B.grad is not None
    assert chosen_B.grad.tolist() == [-0.25, -0.25]  # −(1 − σ(0)) / 2 pairs
    assert rejected_B.grad.tolist() == [0.25, 0.25]


def test_a_soft_label_is_least_costly_where_the_model_agrees_with_it() -> None:
    # The cross-entropy's minimum over d is at σ(d) = p, and its value there is the entropy of p
    p = 0.7
    at = math.log(p / (1 - p))
    losses = bradley_terry(tensor(at, at - 0.1, at + 0.1), tensor(0, 0, 0), p=tensor(p, p, p)).tolist()
    assert losses[0] == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p))
    assert losses[0] < min(losses[1:])


@given(st.floats(-8, 8), st.floats(-8, 8), st.floats(0, 1))
def test_turning_a_pair_and_its_preference_round_changes_nothing(chosen: float, rejected: float, p: float) -> None:
    one = bradley_terry(tensor(chosen), tensor(rejected), p=tensor(p))
    other = bradley_terry(tensor(rejected), tensor(chosen), p=tensor(1 - p))
    assert one.item() == pytest.approx(other.item(), abs=1e-9)
    one = rao_kupper(tensor(chosen), tensor(rejected), tensor(p), 2.0)
    other = rao_kupper(tensor(rejected), tensor(chosen), tensor(1 - p), 2.0)
    if (p == 0.5) == (1 - p == 0.5):
        assert one.item() == pytest.approx(other.item(), abs=1e-9)


def test_the_bradley_terry_loss_is_that_of_a_loop() -> None:
    chosen, rejected, p = drawn(9, 0), drawn(9, 1), torch.linspace(0, 1, 9, dtype=torch.float64)
    m = torch.where(p == 1, 0.7, 0.0)

    def sigma(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    expected = [
        -q * math.log(sigma(c - r - g)) - (1 - q) * math.log(sigma(r - c - g))
        for c, r, q, g in zip(chosen.tolist(), rejected.tolist(), p.tolist(), m.tolist(), strict=True)
    ]
    assert bradley_terry(chosen, rejected, p=p, m=m).tolist() == pytest.approx(expected)


def test_rao_and_kuppers_three_outcomes_by_hand() -> None:
    # θ = 2, r_c = ln 3, r_r = 0: e^c = 3, e^r = 1.
    # P(c > r) = 3/(3 + 2·1) = 3/5, P(r > c) = 1/(1 + 2·3) = 1/7, tie = (4 − 1)·3 / (5·7) = 9/35; 21 + 5 + 9 = 35
    logs = objective.rao_kupper_log_probabilities(tensor(math.log(3)), tensor(0), tie_threshold=2.0)
    assert [log.exp().item() for log in logs] == pytest.approx([3 / 5, 9 / 35, 1 / 7])
    # and what they cost: a win, a tie, a loss, and a win that is believed to be one with 0.9
    d, zero = tensor(*[math.log(3)] * 4), tensor(0, 0, 0, 0)
    expected = [-math.log(3 / 5), -math.log(9 / 35), -math.log(1 / 7), -0.9 * math.log(3 / 5) - 0.1 * math.log(1 / 7)]
    assert rao_kupper(d, zero, tensor(1, 0.5, 0, 0.9), 2.0).tolist() == pytest.approx(expected)


def test_equal_responses_tie_as_often_as_the_threshold_says() -> None:
    for theta in (1.5, 3.0, 9.0):
        _, tie, _ = objective.rao_kupper_log_probabilities(tensor(2), tensor(2), tie_threshold=theta)
        assert tie.exp().item() == pytest.approx((theta - 1) / (theta + 1))


@given(st.floats(-30, 30), st.floats(-30, 30), st.floats(1.001, 50))
def test_rao_and_kuppers_probabilities_are_those_of_their_fractions_and_sum_to_1(c: float, r: float, t: float) -> None:
    logs = objective.rao_kupper_log_probabilities(tensor(c), tensor(r), tie_threshold=t)
    ec, er = math.exp(c), math.exp(r)
    expected = [ec / (ec + t * er), (t * t - 1) * ec * er / ((ec + t * er) * (er + t * ec)), er / (er + t * ec)]
    found = [log.exp().item() for log in logs]
    assert found == pytest.approx(expected, rel=1e-6)
    assert sum(found) == pytest.approx(1)


def test_without_room_for_ties_rao_and_kupper_is_bradley_and_terry() -> None:
    chosen, rejected, p = drawn(7, 0), drawn(7, 1), tensor(1, 0, 0.2, 0.9, 1, 0.4, 0)
    near = rao_kupper(chosen, rejected, p, 1 + 1e-9)
    torch.testing.assert_close(near, bradley_terry(chosen, rejected, p=p), atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("theta", [1 + 1e-6, 3.0, 1e6])
def test_losses_and_gradients_are_finite_however_far_apart_the_scores_are(theta: float) -> None:
    far = torch.tensor(FAR)
    for p in (0.0, 0.25, 0.5, 1.0):
        chosen_B = far.clone().requires_grad_()
        preference_B = torch.full_like(far, p)
        for losses_B in (
            bradley_terry(chosen_B, -far, p=preference_B),
            rao_kupper(chosen_B, -far, preference_B, theta),
        ):
            assert losses_B.isfinite().all()
            [gradient] = torch.autograd.grad(losses_B.sum(), chosen_B)
            assert gradient.isfinite().all()
    # and the tails are straight: d = ±20,000 costs 20,000 more or less
    assert bradley_terry(tensor(-1e4), tensor(1e4)).item() == pytest.approx(2e4)
    assert rao_kupper(tensor(-1e4), tensor(1e4), tensor(1), 3.0).item() == pytest.approx(2e4 + math.log(3))
    # a tie at 20,000 apart: −ln(θ² − 1) + ln θ + (20,000 + ln θ)
    tie = rao_kupper(tensor(1e4), tensor(-1e4), tensor(0.5), 3.0).item()
    assert tie == pytest.approx(2e4 - math.log(8) + math.log(3))


def test_a_tie_pulls_two_scores_together_and_a_win_pushes_them_apart() -> None:
    d = torch.tensor([1.0, 1.0], requires_grad=True)
    [gradient] = torch.autograd.grad(rao_kupper(d, torch.zeros(2), torch.tensor([0.5, 1.0]), 3.0).sum(), d)
    assert gradient[0] > 0 > gradient[1]


def test_the_loss_of_verdicts_by_hand() -> None:
    # σ(ln 3) = 3/4: a good row costs −ln(3/4), a bad one −ln(1/4), by their weights
    scores = tensor(math.log(3), math.log(3))
    losses = objective.verdict_losses(scores, is_good_B=tensor(1, 0), good_weight=2.0, bad_weight=0.5)
    assert losses.tolist() == pytest.approx([-2 * math.log(3 / 4), -0.5 * math.log(1 / 4)])
    far = objective.verdict_losses(tensor(-1e4, 1e4), is_good_B=tensor(1, 0), good_weight=1.0, bad_weight=1.0)
    assert far.tolist() == [1e4, 1e4]


def test_with_even_weights_the_loss_of_verdicts_is_torchs_cross_entropy() -> None:
    scores, is_good = drawn(11, 0), (drawn(11, 1) > 0).double()
    ours = objective.verdict_losses(scores, is_good_B=is_good, good_weight=1.0, bad_weight=1.0)
    theirs = torch.nn.functional.binary_cross_entropy_with_logits(scores, is_good, reduction="none")
    torch.testing.assert_close(ours, theirs)
    weighted = objective.verdict_losses(scores, is_good_B=is_good, good_weight=2.5, bad_weight=1.0)
    theirs = torch.nn.functional.binary_cross_entropy_with_logits(
        scores, is_good, reduction="none", pos_weight=torch.tensor(2.5)
    )
    torch.testing.assert_close(weighted, theirs)


def test_balanced_classes_weigh_the_same_in_all_and_a_row_one_on_average() -> None:
    # 2 good, 6 bad: 8/4 = 2 and 8/12 = 2/3
    good, bad = objective.balanced_weights(2, 6)
    assert (good, bad) == (2, pytest.approx(2 / 3))
    assert 2 * good == pytest.approx(6 * bad)
    assert 2 * good + 6 * bad == pytest.approx(8)


def test_centring_penalizes_the_sum_of_a_pair_and_a_lone_score() -> None:
    # (2 + 1)² = 9, (3 − 3)² = 0; alone 4
    assert objective.centering_penalties((tensor(2, 3), tensor(1, -3))).tolist() == [9, 0]
    assert objective.centering_penalties((tensor(-2),)).tolist() == [4]


def test_an_equal_score_counts_half() -> None:
    assert objective.shares_right(tensor(2, 0, 1, 5), tensor(1, 1, 1, 4)).tolist() == [1, 0, 0.5, 1]


def test_the_area_under_the_curve_by_hand() -> None:
    # good 3, 1; bad 2, 1, 0: 3 beats all three; 1 beats 0 and ties 1: (3 + 1.5) / 6
    assert objective.area_under_curve(tensor(3, 1), tensor(2, 1, 0)).item() == 0.75


@given(st.lists(st.integers(-4, 4), min_size=1, max_size=12), st.lists(st.integers(-4, 4), min_size=1, max_size=12))
def test_the_area_under_the_curve_is_that_of_all_pairs(good: list[int], bad: list[int]) -> None:
    wins = sum((g > b) + 0.5 * (g == b) for g in good for b in bad)
    found = objective.area_under_curve(tensor(*good), tensor(*bad)).item()
    assert found == pytest.approx(wins / (len(good) * len(bad)))
    assert objective.area_under_curve(tensor(*bad), tensor(*good)).item() == pytest.approx(1 - found)


def test_an_ensembles_score_is_the_mean_of_its_members_in_units_of_their_spread() -> None:
    # (4/2 + 3/1) / 2 = 2.5; (−2/2 + 0) / 2 = −0.5
    scores_KN = torch.tensor([[4.0, -2.0], [3.0, 0.0]])
    assert objective.ensemble_scores(scores_KN, torch.tensor([2.0, 1.0])).tolist() == [2.5, -0.5]


def test_an_ensemble_orders_a_pair_as_the_mean_of_standardized_scores_does() -> None:
    scores_KN = drawn(3 * 20, 0).reshape(3, 20) * tensor(1, 10, 0.1)[:, None] + tensor(5, -9, 0)[:, None]
    means_K1, spread_K = scores_KN.mean(1, keepdim=True), scores_KN.std(1, correction=0)
    standardized = ((scores_KN - means_K1) / spread_K[:, None]).mean(0)
    ours = objective.ensemble_scores(scores_KN, spread_K)
    torch.testing.assert_close(ours[:, None] - ours[None], standardized[:, None] - standardized[None])


def test_the_length_rule_counts_right_pairs_and_half_of_equal_lengths() -> None:
    # longer wins: 5 > 3 yes, 2 > 4 no, 3 = 3 half, 9 > 1 yes
    better, worse = torch.tensor([5, 2, 3, 9]), torch.tensor([3, 4, 3, 1])
    assert objective.length_rule_right(better, worse, longer_wins=True).tolist() == [1, 0, 0.5, 1]
    assert objective.length_rule_right(better, worse, longer_wins=False).tolist() == [0, 1, 0.5, 0]


def test_the_best_length_rule_by_hand() -> None:
    # "good unless longer than 5" is always right; where 5 tokens are good once and bad once, 3 and 5 are each right
    # 5 times of 6, and the smaller is taken; where all is good, so is calling all good
    assert objective.best_length_rule([1, 2, 3, 5, 6, 7], [True, True, True, True, False, False]) == (5, False)
    assert objective.best_length_rule([1, 2, 3, 5, 5, 7], [True, True, True, True, False, False]) == (3, False)
    assert objective.best_length_rule([4, 4], [True, True]) == (-1, True)


@given(st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1, max_size=14))
def test_the_best_length_rule_is_right_as_often_as_the_best_of_all(rows: list[tuple[int, bool]]) -> None:
    lengths, is_good = [length for length, _ in rows], [good for _, good in rows]

    def right(threshold: int, longer_is_good: bool) -> int:
        return sum(((length > threshold) == longer_is_good) == good for length, good in rows)

    best = max(right(threshold, wins) for threshold in range(-1, 10) for wins in (True, False))
    assert right(*objective.best_length_rule(lengths, is_good)) == best
