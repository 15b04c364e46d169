"""The formulas of PPO for language models: tensors and floats in, tensors out.

Axes: B episodes, T response tokens. `is_response_BT` is True on real response tokens; a response's tokens are its
first ones in the row. Everything is 0 at padding.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def kl_k1(logprobs_BT: Tensor, ref_logprobs_BT: Tensor) -> Tensor:
    """k1 = log π − log π_ref, the unbiased estimator of KL(π‖π_ref) per token (Schulman 2020). Can be negative."""
    assert logprobs_BT.shape == ref_logprobs_BT.shape, (logprobs_BT.shape, ref_logprobs_BT.shape)
    return logprobs_BT - ref_logprobs_BT


def kl_k2(logprobs_BT: Tensor, ref_logprobs_BT: Tensor) -> Tensor:
    """k2 = ½ (log π − log π_ref)² per token (Schulman 2020): as a loss its gradient is the KL's, in expectation over π.

    k1 as a loss has an expected gradient of 0 (Liu et al. 2025, Rethinking KL Regularization in RLHF).
    """
    assert logprobs_BT.shape == ref_logprobs_BT.shape, (logprobs_BT.shape, ref_logprobs_BT.shape)
    return 0.5 * (logprobs_BT - ref_logprobs_BT).square()


def kl_k3(logprobs_BT: Tensor, ref_logprobs_BT: Tensor) -> Tensor:
    """k3 = exp(−k1) − 1 + k1: unbiased, never negative, less variance (Schulman 2020).

    Unbiased as a value. As a loss (Shao et al. 2024, GRPO, eq. 4) its gradient is that of KL(π_ref‖π), which is off by
    about a half where the two are apart; its direction is nearly right (cosine 0.99).
    """
    assert logprobs_BT.shape == ref_logprobs_BT.shape, (logprobs_BT.shape, ref_logprobs_BT.shape)
    k1_BT = logprobs_BT - ref_logprobs_BT
    return torch.expm1(-k1_BT) + k1_BT


def adaptive_kl_coefficient(coefficient: float, kl: float, *, target: float, horizon: int, num_episodes: int) -> float:
    """β (1 + e·n/horizon), e = (KL − target)/target clipped to ±0.2, for KL in nats a response over n episodes.

    Ziegler et al. 2019, sec. 2.2, with the horizon of their code in place of the constant 0.1.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coefficient * (1 + error * num_episodes / horizon)


@dataclass
class RunningMoments:
    """Mean and variance of all scores so far, one batch at a time (Chan et al. 1979, eq. 2.1)."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0  # the sum of squared deviations from the mean

    def add(self, scores_B: Tensor) -> None:
        count, mean = len(scores_B), scores_B.double().mean().item()
        squares = (scores_B.double() - mean).square().sum().item()
        total, delta = self.count + count, mean - self.mean
        self.squares += squares + delta * delta * self.count * count / total
        self.mean += delta * count / total
        self.count = total

    @property
    def std(self) -> float:
        """Population standard deviation; 1 while the scores do not vary."""
        variance = self.squares / self.count if self.count else 0.0
        return variance**0.5 or 1.0

    def normalized(self, scores_B: Tensor) -> Tensor:
        return (scores_B - self.mean) / self.std


def shaped_scores(
    scores_B: Tensor,
    has_eos_B: Tensor,
    lengths_B: Tensor,
    *,
    clip: float | None,
    missing_eos_penalty: float,
    token_penalty: float,
) -> Tensor:
    """Normalised scores, clipped to ±clip, less what a response without EOS and each token cost: (B,).

    The linear length penalty: Singhal et al. 2023, sec. 4. Penalties come after the clip, so that they cannot be
    clipped away.
    """
    assert scores_B.shape == has_eos_B.shape == lengths_B.shape, (scores_B.shape, has_eos_B.shape, lengths_B.shape)
    shaped_B = scores_B if clip is None else scores_B.clamp(-clip, clip)
    return shaped_B - token_penalty * lengths_B - missing_eos_penalty * (~has_eos_B).float()


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


def rloo(returns_GK: Tensor) -> Tensor:
    """A_k = R_k − the mean of the prompt's other responses' R: (G, K) from G prompts with K responses each.

    REINFORCE leave-one-out (Kool et al. 2019; Ahmadian et al. 2024, eq. 8). R is a response's summed reward, its KL
    penalty included.
    """
    assert returns_GK.shape[1] > 1, returns_GK.shape
    num_responses = returns_GK.shape[1]
    others_GK = (returns_GK.sum(-1, keepdim=True) - returns_GK) / (num_responses - 1)
    return returns_GK - others_GK


def grpo(returns_GK: Tensor) -> Tensor:
    """A_k = (R_k − mean)/std over the prompt's responses: (G, K). Shao et al. 2024 (DeepSeekMath), sec. 4.1.2.

    0 where all of them are equal. The standard deviation is the sample's (K − 1), as in the field's code.
    """
    assert returns_GK.shape[1] > 1, returns_GK.shape
    centred_GK = returns_GK - returns_GK.mean(-1, keepdim=True)
    return centred_GK / (returns_GK.std(-1, keepdim=True) + 1e-4)


def whiten(values: list[Tensor], masks: list[Tensor], *, shift: bool = True) -> list[Tensor]:
    """Scale to variance 1, and shift to mean 0 if asked, over all real tokens of the rollout; 0 at padding.

    The moments are over the whole rollout, not a minibatch, so they do not depend on how it is cut. Rewards are
    whitened without the shift (the code of Ziegler et al. 2019), or every response would be paid for its length.
    """
    flat_N = torch.cat([v[m] for v, m in zip(values, masks, strict=True)])
    mean, std = flat_N.mean(), flat_N.var(unbiased=False).add(1e-8).sqrt()
    kept = torch.zeros_like(mean) if shift else mean
    return [((v - mean) / std + kept) * m for v, m in zip(values, masks, strict=True)]


def loss_weights(is_response_BT: Tensor, *, average: str, num_tokens: int, num_responses: int) -> Tensor:
    """What each token's loss counts in the mean over a minibatch of `num_tokens` in `num_responses`: (B, T).

    "token": 1/num_tokens: every token alike (Yu et al. 2025, DAPO, eq. 12). "sequence": 1/(its response's length ·
    num_responses): every response alike, so a long one's tokens count less (Shao et al. 2024, eq. 3). Given the
    minibatch's totals, the weights of its micro-batches add up to 1 however it is cut.
    """
    mask_BT = is_response_BT.float()
    if average == "token":
        return mask_BT / num_tokens
    return mask_BT / mask_BT.sum(-1, keepdim=True) / num_responses


def policy_loss(
    logprobs_BT: Tensor, old_logprobs_BT: Tensor, advantages_BT: Tensor, *, clip_low: float, clip_high: float
) -> Tensor:
    """The clipped surrogate per token (Schulman et al. 2017, eq. 7), to be minimised: (B, T).

    −min(ρ A, clip(ρ, 1 − ε_low, 1 + ε_high) A), ρ = exp(log π − log π_old). A higher ε_high leaves rare tokens room
    to grow (Yu et al. 2025, DAPO, eq. 10).
    """
    assert logprobs_BT.shape == old_logprobs_BT.shape == advantages_BT.shape
    ratio_BT = (logprobs_BT - old_logprobs_BT).exp()
    clipped_BT = ratio_BT.clamp(1 - clip_low, 1 + clip_high)
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


def is_clipped(logprobs_BT: Tensor, old_logprobs_BT: Tensor, *, clip_low: float, clip_high: float) -> Tensor:
    """1 where the ratio lies outside [1 − clip_low, 1 + clip_high], else 0: (B, T)."""
    ratio_BT = (logprobs_BT - old_logprobs_BT).exp()
    return ((ratio_BT < 1 - clip_low) | (ratio_BT > 1 + clip_high)).float()


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
        return 0.5 * (1 + math.cos(rest * math.pi))
    return 1.0
