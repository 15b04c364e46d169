import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stages.ppo import objective


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mask_of(lengths: list[int]) -> Tensor:
    return torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]


def test_the_weights_of_a_mean_by_token_and_by_sequence() -> None:
    # Two responses, of three tokens and of one. By token each counts ¼; by sequence ½·⅓ and ½.
    mask_BT = mask_of([3, 1])
    totals = {"num_tokens": 4, "num_responses": 2}
    by_token_BT = objective.loss_weights(mask_BT, average="token", **totals)
    torch.testing.assert_close(by_token_BT, torch.tensor([[0.25, 0.25, 0.25], [0.25, 0.0, 0.0]]))
    by_sequence_BT = objective.loss_weights(mask_BT, average="sequence", **totals)
    torch.testing.assert_close(by_sequence_BT, torch.tensor([[1 / 6, 1 / 6, 1 / 6], [0.5, 0.0, 0.0]]))


@pytest.mark.parametrize("average", ["token", "sequence"])
def test_the_weights_of_micro_batches_add_up_to_1_however_a_minibatch_is_cut(average: str) -> None:
    lengths = [4, 1, 2, 3, 3]
    for cuts in ([5], [2, 3], [1, 1, 1, 1, 1]):
        parts = [mask_of(lengths[sum(cuts[:i]) : sum(cuts[: i + 1])]) for i in range(len(cuts))]
        weights = [objective.loss_weights(m, average=average, num_tokens=13, num_responses=5) for m in parts]
        assert sum(w.sum().item() for w in weights) == pytest.approx(1, rel=1e-6)


def test_k1_and_k3_of_one_token() -> None:
    # π = 0.5, π_ref = 0.25: k1 = ln 2, k3 = 0.25/0.5 − 1 + ln 2 = ln 2 − 0.5
    # The other way round: k1 = −ln 2, k3 = 2 − 1 − ln 2
    own, ref = torch.tensor([[0.5, 0.25]]).log(), torch.tensor([[0.25, 0.5]]).log()
    assert objective.kl_k1(own, ref)[0].tolist() == pytest.approx([math.log(2), -math.log(2)])
    assert objective.kl_k3(own, ref)[0].tolist() == pytest.approx([math.log(2) - 0.5, 1 - math.log(2)])


@given(st.floats(-20, 0), st.floats(-20, 0))
def test_k3_is_never_negative(own: float, ref: float) -> None:
    k3 = objective.kl_k3(torch.tensor([[own]], dtype=torch.float64), torch.tensor([[ref]], dtype=torch.float64))
    assert k3.item() >= 0


def test_k1_and_k3_both_have_the_kl_divergence_as_their_mean() -> None:
    logits_V, ref_V = drawn(7, seed=0).log_softmax(-1), drawn(7, seed=1).log_softmax(-1)
    probabilities_V = logits_V.exp()
    divergence = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=logits_V), torch.distributions.Categorical(logits=ref_V)
    )
    for estimator in (objective.kl_k1, objective.kl_k3):
        mean = (probabilities_V * estimator(logits_V[None], ref_V[None])[0]).sum()
        assert mean.item() == pytest.approx(divergence.item(), rel=1e-9)


def test_k1_in_the_reward_has_the_gradient_of_the_kl_divergence() -> None:
    # Exact, by enumerating a vocabulary of 7: E[k1 · ∇log π] = ∇KL
    logits_V, ref_V = drawn(7, seed=2).requires_grad_(), drawn(7, seed=3).log_softmax(-1)
    logprobs_V = logits_V.log_softmax(-1)
    k1_V = objective.kl_k1(logprobs_V[None], ref_V[None])[0]
    (of_divergence,) = torch.autograd.grad((logprobs_V.exp() * k1_V).sum(), logits_V, retain_graph=True)
    in_reward = (logprobs_V.exp().detach() * k1_V.detach() * logprobs_V).sum()
    (of_reward,) = torch.autograd.grad(in_reward, logits_V, retain_graph=True)
    torch.testing.assert_close(of_reward, of_divergence)
    # In the loss it would have no gradient at all in expectation
    (of_loss,) = torch.autograd.grad((logprobs_V.exp().detach() * k1_V).sum(), logits_V)
    torch.testing.assert_close(of_loss, torch.zeros_like(of_loss))


def test_k2_in_the_loss_has_the_gradient_of_the_kl_divergence_and_k3_only_its_direction() -> None:
    logits_V, ref_V = drawn(7, seed=2).requires_grad_(), drawn(7, seed=3).log_softmax(-1)
    logprobs_V = logits_V.log_softmax(-1)
    k1_V = objective.kl_k1(logprobs_V[None], ref_V[None])[0]
    (exact,) = torch.autograd.grad((logprobs_V.exp() * k1_V).sum(), logits_V, retain_graph=True)

    def of_loss(estimator: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        values_V = estimator(logprobs_V[None], ref_V[None])[0]
        return torch.autograd.grad((logprobs_V.exp().detach() * values_V).sum(), logits_V, retain_graph=True)[0]

    torch.testing.assert_close(of_loss(objective.kl_k2), exact)
    biased = of_loss(objective.kl_k3)
    assert (biased - exact).norm() > 0.2 * exact.norm()
    assert torch.cosine_similarity(biased, exact, dim=0) > 0.6


def test_k2_of_one_token() -> None:
    # ½ (ln 0.5 − ln 0.25)² = ½ (ln 2)²
    own, ref = torch.tensor([[0.5]]).log(), torch.tensor([[0.25]]).log()
    assert objective.kl_k2(own, ref).item() == pytest.approx(math.log(2) ** 2 / 2)


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (6.0, 0.1),  # on target
        (6.6, 0.1 * 1.001),  # 10 % over: 1 + 0.1·100/10000
        (60.0, 0.1 * 1.002),  # far over: the error is cut at 0.2
        (0.0, 0.1 * 0.998),
    ],
)
def test_the_adaptive_coefficient_follows_the_kl(kl: float, expected: float) -> None:
    found = objective.adaptive_kl_coefficient(0.1, kl, target=6.0, horizon=10_000, num_episodes=100)
    assert found == pytest.approx(expected)


def test_running_moments_are_those_of_everything_seen() -> None:
    moments, batches = objective.RunningMoments(), [2 + 3 * drawn(n, seed=n) for n in (1, 4, 7)]
    assert (moments.mean, moments.std) == (0.0, 1.0)
    for batch_B in batches:
        moments.add(batch_B)
    everything = torch.cat(batches)
    assert moments.count == 12
    assert moments.mean == pytest.approx(everything.mean().item())
    assert moments.std == pytest.approx(everything.std(unbiased=False).item())
    normalized = moments.normalized(everything)
    assert (normalized.mean().item(), normalized.std(unbiased=False).item()) == pytest.approx((0.0, 1.0), abs=1e-5)


def test_running_moments_of_one_value_leave_scores_unscaled() -> None:
    moments = objective.RunningMoments()
    moments.add(torch.tensor([3.0, 3.0]))
    assert (moments.mean, moments.std) == (3.0, 1.0)
    assert moments.normalized(torch.tensor([5.0])).tolist() == [2.0]


def test_scores_are_clipped_then_penalised() -> None:
    # 20 → 5; −20 → −5, and −5 − 1 without EOS: not clipped away. 0.05 a token: 2 cost 0.1, 4 cost 0.2, 8 cost 0.4
    scores_B, has_eos_B = torch.tensor([0.5, 20.0, -20.0]), torch.tensor([True, True, False])
    lengths_B = torch.tensor([2, 4, 8])
    shaped_B = objective.shaped_scores(
        scores_B, has_eos_B, lengths_B, clip=5.0, missing_eos_penalty=1.0, token_penalty=0.05
    )
    assert shaped_B.tolist() == pytest.approx([0.4, 4.8, -6.4])
    shaped_B = objective.shaped_scores(
        scores_B, has_eos_B, lengths_B, clip=None, missing_eos_penalty=0.0, token_penalty=0.0
    )
    assert shaped_B.tolist() == scores_B.tolist()


def test_rloo_compares_with_the_mean_of_the_others() -> None:
    # 1 against (2 + 6)/2 = 4; 2 against 3.5; 6 against 1.5
    found = objective.rloo(torch.tensor([[1.0, 2.0, 6.0], [5.0, 5.0, 5.0]]))
    assert found.tolist() == [[-3.0, -1.5, 4.5], [0.0, 0.0, 0.0]]


def test_grpo_compares_in_units_of_the_prompts_own_spread() -> None:
    # mean 3, sample std √7 = √((4 + 1 + 9)/2); equal returns give 0
    found = objective.grpo(torch.tensor([[1.0, 2.0, 6.0], [5.0, 5.0, 5.0]]))
    assert found[0].tolist() == pytest.approx([x / (7**0.5 + 1e-4) for x in (-2.0, -1.0, 3.0)])
    assert found[1].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("formula", [objective.rloo, objective.grpo])
def test_group_advantages_are_the_same_as_a_plain_loop_sum_to_0_and_ignore_a_shift(
    formula: Callable[[Tensor], Tensor],
) -> None:
    returns_GK = drawn(5, 4, seed=20)
    found_GK = formula(returns_GK)
    torch.testing.assert_close(found_GK.sum(-1), torch.zeros(5, dtype=torch.float64))
    torch.testing.assert_close(formula(returns_GK + 7.0), found_GK)
    for g, k in itertools.product(range(5), range(4)):
        row = returns_GK[g].tolist()
        others = [r for i, r in enumerate(row) if i != k]
        mean = sum(row) / 4
        spread = (sum((r - mean) ** 2 for r in row) / 3) ** 0.5
        plain = row[k] - sum(others) / 3 if formula is objective.rloo else (row[k] - mean) / (spread + 1e-4)
        assert found_GK[g, k].item() == pytest.approx(plain)


def test_whitening_without_the_shift_keeps_the_mean() -> None:
    masks = [mask_of([2, 3])]
    values = [7 + 3 * drawn(2, 3, seed=30)]
    whitened = objective.whiten(values, masks, shift=False)[0][masks[0]]
    assert whitened.mean().item() == pytest.approx(values[0][masks[0]].mean().item())
    assert whitened.var(unbiased=False).item() == pytest.approx(1)


def test_the_upper_clip_can_be_wider_than_the_lower() -> None:
    old_BT, advantage_BT = torch.zeros(1, 2), torch.tensor([[1.0, -1.0]])
    logprobs_BT = torch.tensor([[1.25, 0.75]]).log()
    loss_BT = objective.policy_loss(logprobs_BT, old_BT, advantage_BT, clip_low=0.2, clip_high=0.28)
    assert loss_BT[0].tolist() == pytest.approx([-1.25, 0.8])  # 1.25 is inside 1.28; 0.75 is outside 0.8
    assert objective.is_clipped(logprobs_BT, old_BT, clip_low=0.2, clip_high=0.28).tolist() == [[0.0, 1.0]]


def test_the_score_is_added_on_the_real_last_token() -> None:
    # β = 0.5. Row 0: −0.05, 0.1, −0.15 + 2. Row 1 ends at its second token: −0.1, −0.2 − 1, and nothing past it.
    kl_BT = torch.tensor([[0.1, -0.2, 0.3], [0.2, 0.4, 9.0]])
    rewards_BT = objective.token_rewards(torch.tensor([2.0, -1.0]), kl_BT, mask_of([3, 2]), kl_coefficient=0.5)
    torch.testing.assert_close(rewards_BT, torch.tensor([[-0.05, 0.1, 1.85], [-0.1, -1.2, 0.0]]))


def test_the_rewards_of_a_response_sum_to_its_score_less_beta_times_kl() -> None:
    mask_BT, kl_BT, scores_B = mask_of([1, 5, 3]), drawn(3, 5, seed=4), drawn(3, seed=5)
    rewards_BT = objective.token_rewards(scores_B, kl_BT, mask_BT, kl_coefficient=0.3)
    torch.testing.assert_close(rewards_BT.sum(-1), scores_B - 0.3 * (kl_BT * mask_BT).sum(-1))


def test_gae_of_three_tokens() -> None:
    # γ 0.9, λ 0.5, so γλ = 0.45
    # δ2 = 3 − 1.5 = 1.5                A2 = 1.5
    # δ1 = 2 + 0.9·1.5 − 1 = 2.35       A1 = 2.35 + 0.45·1.5 = 3.025
    # δ0 = 1 + 0.9·1 − 0.5 = 1.4        A0 = 1.4 + 0.45·3.025 = 2.76125
    # The second row has one token: A0 = 2 − 0.5; what stands at its padding is nothing.
    rewards_BT = torch.tensor([[1.0, 2.0, 3.0], [2.0, 77.0, 77.0]])
    values_BT = torch.tensor([[0.5, 1.0, 1.5], [0.5, 99.0, 99.0]])
    advantages_BT, returns_BT = objective.gae(rewards_BT, values_BT, mask_of([3, 1]), gamma=0.9, lam=0.5)
    torch.testing.assert_close(advantages_BT, torch.tensor([[2.76125, 3.025, 1.5], [1.5, 0.0, 0.0]]))
    torch.testing.assert_close(returns_BT, torch.tensor([[3.26125, 4.025, 3.0], [2.0, 0.0, 0.0]]))


def gae_by_a_plain_loop(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """A_t = Σ_l (γλ)^l δ_{t+l}, each sum written out."""
    deltas = [
        rewards[t] + gamma * (values[t + 1] if t + 1 < len(values) else 0.0) - values[t] for t in range(len(values))
    ]
    return [
        sum((gamma * lam) ** l * deltas[t + l] for l in range(len(deltas) - t))  # noqa: E741
        for t in range(len(deltas))
    ]


LENGTHS = st.lists(st.integers(1, 7), min_size=1, max_size=5)
SEEDS = st.integers(0, 2**31)


@settings(deadline=None, max_examples=50)
@given(LENGTHS, st.floats(0.1, 1), st.floats(0, 1), SEEDS)
def test_gae_is_the_same_as_a_plain_loop_on_ragged_rows(
    lengths: list[int], gamma: float, lam: float, seed: int
) -> None:
    shape = (len(lengths), max(lengths))
    rewards_BT, values_BT = drawn(*shape, seed=seed), drawn(*shape, seed=seed + 1)
    advantages_BT, returns_BT = objective.gae(rewards_BT, values_BT, mask_of(lengths), gamma=gamma, lam=lam)
    for row, length in enumerate(lengths):
        values = values_BT[row, :length].tolist()
        expected = gae_by_a_plain_loop(rewards_BT[row, :length].tolist(), values, gamma, lam)
        assert advantages_BT[row, :length].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)
        sums = [a + v for a, v in zip(expected, values, strict=True)]
        assert returns_BT[row, :length].tolist() == pytest.approx(sums, rel=1e-5, abs=1e-5)
        assert not advantages_BT[row, length:].any()
        assert not returns_BT[row, length:].any()


def test_gae_with_lambda_1_is_the_discounted_return_less_the_value() -> None:
    rewards_BT, values_BT, mask_BT = drawn(1, 6, seed=6), drawn(1, 6, seed=7), mask_of([6])
    advantages_BT, returns_BT = objective.gae(rewards_BT, values_BT, mask_BT, gamma=0.9, lam=1.0)
    rewards = rewards_BT[0].tolist()
    discounted = [sum(0.9 ** (k - t) * rewards[k] for k in range(t, 6)) for t in range(6)]
    assert returns_BT[0].tolist() == pytest.approx(discounted)
    assert advantages_BT[0].tolist() == pytest.approx((torch.tensor(discounted) - values_BT[0]).tolist())


def test_gae_with_lambda_0_is_the_temporal_difference_error() -> None:
    rewards_BT, values_BT = drawn(2, 4, seed=8), drawn(2, 4, seed=9)
    advantages_BT, _ = objective.gae(rewards_BT, values_BT, mask_of([4, 4]), gamma=0.7, lam=0.0)
    next_BT = torch.cat([values_BT[:, 1:], torch.zeros(2, 1)], dim=1)
    torch.testing.assert_close(advantages_BT, rewards_BT + 0.7 * next_BT - values_BT)


def test_whitening_gives_mean_0_and_variance_1_over_real_tokens_and_0_at_padding() -> None:
    masks = [mask_of([2, 5]), mask_of([1, 3])]
    values = [torch.where(mask, 7 + 3 * drawn(*mask.shape, seed=i), 1e6) for i, mask in enumerate(masks)]
    whitened = objective.whiten(values, masks)
    flat_N = torch.cat([v[m] for v, m in zip(whitened, masks, strict=True)])
    assert flat_N.mean().item() == pytest.approx(0, abs=1e-6)
    assert flat_N.var(unbiased=False).item() == pytest.approx(1, abs=1e-6)
    assert all(not v[~m].any() for v, m in zip(whitened, masks, strict=True))


def test_whitening_does_not_depend_on_how_the_rollout_is_cut() -> None:
    values_BT, mask_BT = drawn(4, 3, seed=10), mask_of([3, 1, 2, 3])
    whole = objective.whiten([values_BT], [mask_BT])[0]
    cut = objective.whiten([values_BT[:1], values_BT[1:]], [mask_BT[:1], mask_BT[1:]])
    torch.testing.assert_close(torch.cat(cut), whole)


def test_whitening_equal_values_gives_zeros() -> None:
    assert objective.whiten([torch.full((2, 3), 4.0)], [mask_of([3, 3])])[0].tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "gradient"),
    [
        (2.0, 1.5, -2.4, 0.0),  # good and already likelier by more than 20 %: −1.2·2, no further push
        (-2.0, 1.5, 3.0, 3.0),  # bad and likelier: not clipped, gradient −ρA
        (2.0, 0.5, -1.0, -1.0),  # good and less likely: not clipped
        (-2.0, 0.5, 1.6, 0.0),  # bad and already less likely: 0.8·2, no further push
    ],
)
def test_clipping_stops_the_gradient_only_where_the_ratio_has_gone_far_enough(
    advantage: float, ratio: float, loss: float, gradient: float
) -> None:
    old_BT = torch.tensor([[-1.0]])
    logprobs_BT = (old_BT + math.log(ratio)).requires_grad_()
    loss_BT = objective.policy_loss(logprobs_BT, old_BT, torch.tensor([[advantage]]), clip_low=0.2, clip_high=0.2)
    assert loss_BT.item() == pytest.approx(loss)
    loss_BT.sum().backward()
    assert logprobs_BT.grad is not None
    assert logprobs_BT.grad.item() == pytest.approx(gradient)


def test_at_ratio_1_the_policy_loss_is_minus_the_advantage_with_the_policy_gradient() -> None:
    logits_TV, actions_T, advantages_T = (
        drawn(4, 5, seed=11).requires_grad_(),
        torch.tensor([0, 3, 1, 4]),
        drawn(4, seed=12),
    )
    logprobs_T = logits_TV.log_softmax(-1)[torch.arange(4), actions_T]
    loss_BT = objective.policy_loss(
        logprobs_T[None], logprobs_T.detach()[None], advantages_T[None], clip_low=0.2, clip_high=0.2
    )
    torch.testing.assert_close(loss_BT[0], -advantages_T)
    loss_BT.sum().backward()
    # ∇ log softmax = onehot − p
    grad_log_pi = torch.nn.functional.one_hot(actions_T, 5) - logits_TV.detach().softmax(-1)
    torch.testing.assert_close(logits_TV.grad, -advantages_T[:, None] * grad_log_pi)


@pytest.mark.parametrize(
    ("value", "clip", "loss", "gradient"),
    [
        # R = 3, old value 1
        (2.0, None, 0.5, -1.0),  # ½(2−3)²
        (2.0, 0.2, 1.62, 0.0),  # clipped to 1.2: ½(1.2−3)² is larger, and does not move with V
        (0.0, 0.2, 4.5, -3.0),  # went the wrong way: ½(0−3)² is larger than ½(0.8−3)²
        (1.1, 0.2, 1.805, -1.9),  # inside: as without the clip
    ],
)
def test_the_value_loss_is_the_larger_of_the_plain_and_the_clipped(
    value: float, clip: float | None, loss: float, gradient: float
) -> None:
    values_BT = torch.tensor([[value]], requires_grad=True)
    loss_BT = objective.value_loss(values_BT, torch.tensor([[1.0]]), torch.tensor([[3.0]]), clip=clip)
    assert loss_BT.item() == pytest.approx(loss)
    loss_BT.sum().backward()
    assert values_BT.grad is not None
    assert values_BT.grad.item() == pytest.approx(gradient)


def test_ratios_outside_the_range_are_clipped_in_both_directions() -> None:
    ratios_BT = torch.tensor([[1.3, 0.7], [1.1, 0.9]])
    found_BT = objective.is_clipped(ratios_BT.log(), torch.zeros(2, 2), clip_low=0.2, clip_high=0.2)
    assert found_BT.tolist() == [[1.0, 1.0], [0.0, 0.0]]


def test_explained_variance_is_1_for_perfect_values_0_for_a_constant_and_negative_for_worse() -> None:
    returns_N = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert objective.explained_variance(returns_N, returns_N).item() == 1
    assert objective.explained_variance(torch.full((4,), 9.0), returns_N).item() == 0
    assert objective.explained_variance(-returns_N, returns_N).item() == -3  # 1 − Var(2R)/Var(R)
    assert objective.explained_variance(returns_N, torch.ones(4)).item() == 0


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0, [1, 1, 1, 1]),
        ("linear", 0, [1, 0.75, 0.5, 0.25]),
        ("cosine", 0, [1, 0.853553, 0.5, 0.146447]),  # (1 + cos(k π/4)) / 2
        ("linear", 2, [1 / 3, 2 / 3, 1, 0.5]),
        ("constant", 1, [0.5, 1, 1, 1]),
    ],
)
def test_the_schedule_warms_up_then_falls_and_the_last_update_still_learns(
    schedule: str, warmup: int, expected: list[float]
) -> None:
    factors = [objective.schedule_factor(step, 4, schedule=schedule, warmup=warmup) for step in range(4)]
    assert factors == pytest.approx(expected, abs=1e-6)
