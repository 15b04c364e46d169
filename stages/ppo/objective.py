"""The formulas of PPO for language models: tensors and floats in, tensors out.

Axes: B episodes, T response tokens. `is_response_BT` is True on real response tokens; a response's tokens are its
first ones in the row. Everything is 0 at padding.
"""

import torch
from torch import Tensor


def masked_mean(values_BT: Tensor, is_response_BT: Tensor) -> Tensor:
    """Mean over the tokens where the mask is True: ()."""
    assert values_BT.shape == is_response_BT.shape, (values_BT.shape, is_response_BT.shape)
    return (values_BT * is_response_BT).sum() / is_response_BT.sum()


def kl_k1(logprobs_BT: Tensor, ref_logprobs_BT: Tensor) -> Tensor:
    """k1 = log π − log π_ref, the unbiased estimator of KL(π‖π_ref) per token (Schulman 2020). Can be negative."""
    assert logprobs_BT.shape == ref_logprobs_BT.shape, (logprobs_BT.shape, ref_logprobs_BT.shape)
    return logprobs_BT - ref_logprobs_BT


def kl_k3(logprobs_BT: Tensor, ref_logprobs_BT: Tensor) -> Tensor:
    """k3 = exp(−k1) − 1 + k1: unbiased, never negative, less variance (Schulman 2020). Logged only."""
    assert logprobs_BT.shape == ref_logprobs_BT.shape, (logprobs_BT.shape, ref_logprobs_BT.shape)
    k1_BT = logprobs_BT - ref_logprobs_BT
    return torch.expm1(-k1_BT) + k1_BT


def shaped_scores(
    scores_B: Tensor, has_eos_B: Tensor, *, mean: float, std: float, clip: float | None, missing_eos_penalty: float
) -> Tensor:
    """(score − mean)/std, clipped to ±clip, less the penalty where the response did not end: (B,).

    Normalising by the reward model's own scale on SFT samples: Stiennon et al. 2020, sec. 3.4. The penalty comes
    after the clip, so that it cannot be clipped away.
    """
    assert scores_B.shape == has_eos_B.shape, (scores_B.shape, has_eos_B.shape)
    shaped_B = (scores_B - mean) / std
    if clip is not None:
        shaped_B = shaped_B.clamp(-clip, clip)
    return shaped_B - missing_eos_penalty * (~has_eos_B).float()


def token_rewards(scores_B: Tensor, kl_BT: Tensor, is_response_BT: Tensor, *, kl_coefficient: float) -> Tensor:
    """r_t = −β·k1_t, plus the score on the real last token: (B, T). Ziegler et al. 2019, eq. 2.

    TRL placed the score one token past EOS; here it is on the last token of the response itself.
    """
    assert kl_BT.shape == is_response_BT.shape, (kl_BT.shape, is_response_BT.shape)
    rewards_BT = -kl_coefficient * kl_BT * is_response_BT
    last_B1 = is_response_BT.sum(-1, keepdim=True) - 1
    return rewards_BT.scatter_add(-1, last_B1, scores_B[:, None])


def gae(
    rewards_BT: Tensor, values_BT: Tensor, is_response_BT: Tensor, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16) and returns = advantages + values: (B, T) each.

    δ_t = r_t + γ V_{t+1} − V_t;  A_t = δ_t + γλ A_{t+1}. values_BT[:, t] is the state before token t; the value after
    the last token is 0: a response is a whole episode, also one cut at the length limit (the missing-EOS penalty is
    its price).
    """
    assert rewards_BT.shape == values_BT.shape == is_response_BT.shape, (rewards_BT.shape, values_BT.shape)
    mask_BT = is_response_BT.float()
    values_BT = values_BT * mask_BT
    advantages_BT = torch.zeros_like(rewards_BT)
    advantage_B = torch.zeros_like(rewards_BT[:, 0])
    next_value_B = torch.zeros_like(advantage_B)
    for t in reversed(range(rewards_BT.shape[1])):
        delta_B = rewards_BT[:, t] + gamma * next_value_B - values_BT[:, t]
        # at padding both carried values stay 0, so the last real token sees nothing after it
        advantage_B = (delta_B + gamma * lam * advantage_B) * mask_BT[:, t]
        next_value_B = values_BT[:, t]
        advantages_BT[:, t] = advantage_B
    return advantages_BT, (advantages_BT + values_BT) * mask_BT


def whiten(values: list[Tensor], masks: list[Tensor]) -> list[Tensor]:
    """Shift and scale to mean 0 and variance 1 over all real tokens of the rollout, 0 at padding.

    The moments are over the whole rollout, not a minibatch, so they do not depend on how it is cut.
    """
    flat_N = torch.cat([v[m] for v, m in zip(values, masks, strict=True)])
    mean, std = flat_N.mean(), flat_N.var(unbiased=False).add(1e-8).sqrt()
    return [(v - mean) / std * m for v, m in zip(values, masks, strict=True)]


def policy_loss(logprobs_BT: Tensor, old_logprobs_BT: Tensor, advantages_BT: Tensor, *, clip: float) -> Tensor:
    """The clipped surrogate per token (Schulman et al. 2017, eq. 7), to be minimised: (B, T).

    −min(ρ A, clip(ρ, 1 − ε, 1 + ε) A), ρ = exp(log π − log π_old).
    """
    assert logprobs_BT.shape == old_logprobs_BT.shape == advantages_BT.shape
    ratio_BT = (logprobs_BT - old_logprobs_BT).exp()
    clipped_BT = ratio_BT.clamp(1 - clip, 1 + clip)
    return -torch.minimum(ratio_BT * advantages_BT, clipped_BT * advantages_BT)


def value_loss(values_BT: Tensor, old_values_BT: Tensor, returns_BT: Tensor, *, clip: float | None) -> Tensor:
    """½ max((V − R)², (V_clipped − R)²) per token, V_clipped within ±clip of the old value: (B, T).

    As in Stiennon et al. 2020 and in the PPO2 of OpenAI baselines.
    """
    assert values_BT.shape == old_values_BT.shape == returns_BT.shape
    loss_BT = (values_BT - returns_BT).square()
    if clip is not None:
        clipped_BT = old_values_BT + (values_BT - old_values_BT).clamp(-clip, clip)
        loss_BT = torch.maximum(loss_BT, (clipped_BT - returns_BT).square())
    return 0.5 * loss_BT


def clip_fraction(logprobs_BT: Tensor, old_logprobs_BT: Tensor, is_response_BT: Tensor, *, clip: float) -> Tensor:
    """The share of tokens whose ratio lies outside 1 ± clip: ()."""
    outside_BT = ((logprobs_BT - old_logprobs_BT).exp() - 1).abs() > clip
    return masked_mean(outside_BT.float(), is_response_BT)


def explained_variance(values_N: Tensor, returns_N: Tensor) -> Tensor:
    """1 − Var(R − V)/Var(R) over real tokens: () in (−∞, 1]; 0 where the returns do not vary."""
    assert values_N.shape == returns_N.shape, (values_N.shape, returns_N.shape)
    variance = returns_N.var(unbiased=False)
    if variance == 0:
        return torch.zeros_like(variance)
    return 1 - (returns_N - values_N).var(unbiased=False) / variance


def schedule_factor(step: int, total: int, *, schedule: str, warmup: int) -> float:
    """What the learning rate is multiplied by at `step` of `total`, both in updates.

    Linear warm-up to 1 over `warmup` updates; then constant, linear to 0 or cosine to 0, never 0 on the last update.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    rest = (step - warmup) / max(1, total - warmup)
    if schedule == "linear":
        return 1 - rest
    if schedule == "cosine":
        return 0.5 * (1 + float(torch.cos(torch.tensor(rest * torch.pi, dtype=torch.float64))))
    return 1.0
