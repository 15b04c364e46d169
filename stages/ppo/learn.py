"""Learning from one rollout: advantages, then epochs × minibatches × micro-batches of the clipped objective."""

from dataclasses import dataclass

import torch
from torch import Tensor

from align.adapters import AdaptedModel
from align.config import PPOConfig
from align.episodes import policy_pass, value_pass
from align.errors import InvariantError
from align.randomness import permutation
from stages.ppo import objective
from stages.ppo.actor_critic import ActorCritic
from stages.ppo.rollout import POLICY, VALUE, Rollout


@dataclass(frozen=True)
class Lesson:
    """What the learner needs of a rollout: one tensor (B, T) for each of its micro-batches."""

    rollout: Rollout
    advantages: list[Tensor]
    returns: list[Tensor]


def estimate(rollout: Rollout, rewards: list[Tensor], config: PPOConfig) -> Lesson:
    """Advantages, whitened over the whole rollout if asked, and returns."""
    pairs = [
        objective.gae(r, mb.values_BT, mb.is_response_BT, gamma=config.advantage.gamma, lam=config.advantage.lam)
        for r, mb in zip(rewards, rollout.micro_batches, strict=True)
    ]
    advantages = [advantages_BT for advantages_BT, _ in pairs]
    if config.advantage.whiten:
        advantages = objective.whiten(advantages, [mb.is_response_BT for mb in rollout.micro_batches])
    return Lesson(rollout, advantages, [returns_BT for _, returns_BT in pairs])


def learn(
    learner: ActorCritic, lesson: Lesson, config: PPOConfig, model: AdaptedModel, *, seed: int, update: int
) -> dict[str, float]:
    """Epochs × minibatches × micro-batches over one rollout; returns the means over what was learnt from.

    Micro-batches are shuffled whole. A minibatch's loss is the mean over its tokens, so its gradient is the same
    whatever the micro-batch size.
    """
    micro_batches = lesson.rollout.micro_batches
    size = len(micro_batches) // config.loss.minibatches
    seen: list[dict[str, float]] = []
    first_ratio_error = 0.0
    for epoch in range(config.loss.epochs):
        order = permutation(seed, "minibatches", update, epoch, size=len(micro_batches))
        for start in range(0, len(order), size):
            minibatch = order[start : start + size]
            step = _learn_minibatch(learner, lesson, minibatch, config, model)
            if not seen:
                first_ratio_error = step["ratio_error"]
                _verify_first_ratio(first_ratio_error, model)
            seen.append(step)
            if config.guard.target_kl is not None and step["policy/approxkl"] > config.guard.target_kl:
                return _mean(seen) | {"policy/first_ratio_error": first_ratio_error, "policy/stopped": 1.0}
    return _mean(seen) | {"policy/first_ratio_error": first_ratio_error, "policy/stopped": 0.0}


def _learn_minibatch(
    learner: ActorCritic, lesson: Lesson, minibatch: list[int], config: PPOConfig, model: AdaptedModel
) -> dict[str, float]:
    """Accumulate one minibatch's gradient over its micro-batches and step; returns its metrics."""
    chosen = [lesson.rollout.micro_batches[i] for i in minibatch]
    num_tokens = sum(int(mb.is_response_BT.sum()) for mb in chosen)
    sums: dict[str, float] = {}
    ratio_error = 0.0
    for i, mb in zip(minibatch, chosen, strict=True):
        mask_BT = mb.is_response_BT
        share = int(mask_BT.sum()) / num_tokens
        with model.role(POLICY, train=True):
            out = policy_pass(
                model,
                mb.batch,
                temperature=config.rollout.temperature,
                value_head=None if learner.critic_is_adapter else learner.value_head,
            )
            policy_BT = objective.policy_loss(
                out.logprobs_BT, mb.logprobs_BT, lesson.advantages[i], clip=config.loss.clip
            )
            policy_loss = objective.masked_mean(policy_BT, mask_BT)
            value_loss = torch.zeros((), device=model.device)
            if out.values_BT is not None:
                value_loss = _value_loss(out.values_BT, lesson, i, config)
            _backward((policy_loss + config.critic.coefficient * value_loss) * share)
        if out.values_BT is None:
            with model.role(VALUE, train=True):
                values_BT = value_pass(model, learner.value_head, mb.batch)
                value_loss = _value_loss(values_BT, lesson, i, config)
                _backward(config.critic.coefficient * value_loss * share)
        with torch.no_grad():
            log_ratio_BT = (out.logprobs_BT - mb.logprobs_BT) * mask_BT
            ratio_error = max(ratio_error, torch.expm1(log_ratio_BT).abs().max().item())
            parts = {
                "loss/policy": policy_loss,
                "loss/value": value_loss,
                "policy/approxkl": 0.5 * objective.masked_mean(log_ratio_BT.square(), mask_BT),
                "policy/clipfrac": objective.clip_fraction(
                    out.logprobs_BT, mb.logprobs_BT, mask_BT, clip=config.loss.clip
                ),
            }
        for name, value in parts.items():
            sums[name] = sums.get(name, 0.0) + value.item() * share
    return {**sums, "optimizer/gradient_norm": learner.step(), "ratio_error": ratio_error}


def _value_loss(values_BT: Tensor, lesson: Lesson, i: int, config: PPOConfig) -> Tensor:
    mb = lesson.rollout.micro_batches[i]
    loss_BT = objective.value_loss(values_BT, mb.values_BT, lesson.returns[i], clip=config.critic.clip)
    return objective.masked_mean(loss_BT, mb.is_response_BT)


def _backward(loss: Tensor) -> None:
    if not torch.isfinite(loss):
        raise InvariantError(f"the loss is {loss.item()} before the optimizer's step; nothing was changed")
    loss.backward()


def _mean(steps: list[dict[str, float]]) -> dict[str, float]:
    names = [name for name in steps[0] if name != "ratio_error"]
    return {name: sum(step[name] for step in steps) / len(steps) for name in names}


def ratio_tolerance(model: AdaptedModel) -> float:
    """How far two computations of the same logprobs may be apart, in nats."""
    return 1e-5 if model.base.dtype == torch.float32 else 1e-3


def _verify_first_ratio(error: float, model: AdaptedModel) -> None:
    if not error <= ratio_tolerance(model):
        raise InvariantError(
            f"the first minibatch's ratio is not 1: largest |ratio − 1| is {error:.3g}, allowed "
            f"{ratio_tolerance(model):.0e}; old logprobs were not computed as the learner computes them"
        )
