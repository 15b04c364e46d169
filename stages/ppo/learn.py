"""Learning from one rollout: advantages, then epochs × minibatches × micro-batches of the clipped objective."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from align.adapters import AdaptedModel
from align.config import AdvantageConfig, PPOConfig
from align.episodes import PolicyPass, policy_pass, text_pass, value_pass
from align.errors import DIVERGED, InvariantError
from align.randomness import drawn_indices, permutation
from data.batching import length_sorted_batches
from data.tokenization import TokenizedDemonstration
from stages.ppo import objective
from stages.ppo.actor_critic import ActorCritic
from stages.ppo.rollout import POLICY, VALUE, MicroBatch, Rollout


@dataclass(frozen=True)
class Experience:
    """A micro-batch and what is learnt from it: (B, T) float32; padding holds 0."""

    mb: MicroBatch
    advantages_BT: Tensor
    returns_BT: Tensor  # what the critic learns; 0 without one


def estimate(rollout: Rollout, rewards: list[Tensor], config: AdvantageConfig) -> list[Experience]:
    """Advantages, whitened over the whole rollout if asked, and returns of each micro-batch."""
    mbs = rollout.micro_batches
    if config.estimator == "gae":
        pairs = [
            objective.gae(r, mb.values_BT, mb.is_response_BT, gamma=config.gamma, lam=config.lam)
            for r, mb in zip(rewards, mbs, strict=True)
        ]
        advantages, returns = [a for a, _ in pairs], [r for _, r in pairs]
    else:
        advantages, returns = _group_advantages(mbs, rewards, config.estimator), [torch.zeros_like(r) for r in rewards]
    if config.is_whitened:
        advantages = objective.whiten(advantages, [mb.is_response_BT for mb in mbs])
    return [Experience(*parts) for parts in zip(mbs, advantages, returns, strict=True)]


def _group_advantages(mbs: Sequence[MicroBatch], rewards: list[Tensor], estimator: str) -> list[Tensor]:
    """Each response against the others to its prompt, wherever they stand in the rollout; one value for its tokens."""
    returns_N = torch.cat([r.sum(-1) for r in rewards])
    order_N = torch.cat([mb.group_B for mb in mbs]).argsort(stable=True)
    num_groups = len(set(torch.cat([mb.group_B for mb in mbs]).tolist()))
    formula = objective.rloo if estimator == "rloo" else objective.grpo
    advantages_N = torch.empty_like(returns_N)
    advantages_N[order_N] = formula(returns_N[order_N].view(num_groups, -1)).reshape(-1)
    parts = advantages_N.split([len(r) for r in rewards])
    return [part_B[:, None] * mb.is_response_BT for part_B, mb in zip(parts, mbs, strict=True)]


@dataclass(frozen=True)
class Texts:
    """What PPO-ptx learns beside the rollout (Ouyang et al. 2022, InstructGPT, eq. 2)."""

    rows: Sequence[TokenizedDemonstration]
    pad_id: int


class Learner:
    """One update's learning. `moves_policy` is off while only the critic warms up."""

    def __init__(
        self,
        actor_critic: ActorCritic,
        model: AdaptedModel,
        config: PPOConfig,
        *,
        seed: int,
        split: int = 1,
        texts: Texts | None = None,
    ) -> None:
        self._actor_critic = actor_critic
        self._model = model
        self._config = config
        self._seed = seed
        self._split = split
        self._texts = texts

    def learn(self, experience: Sequence[Experience], *, update: int, kl_coefficient: float = 0.0) -> dict[str, float]:
        """Epochs × minibatches over one rollout; returns the means over what was learnt from. The coefficient is that
        of the KL term, where that is in the loss.

        Micro-batches are shuffled whole, and so are the parts of one that is split. A minibatch's loss is a mean over
        all of it, so its gradient is the same whatever the split.
        """
        config = self._config
        moves_policy = update >= config.critic.warmup_updates or self._actor_critic.critic is None
        seen: list[dict[str, float]] = []
        first_ratio_error, stopped = 0.0, False
        with self._actor_critic.gradients(moves_policy=moves_policy):
            for number, minibatch in self._minibatches(len(experience), update):
                chosen = [experience[i] for i in minibatch]
                try:
                    step = self._learn_minibatch(
                        chosen, number, kl_coefficient=kl_coefficient, moves_policy=moves_policy
                    )
                except InvariantError as error:
                    raise InvariantError(f"ppo update {update + 1}, minibatch {len(seen) + 1}: {error}") from None
                if not seen:
                    first_ratio_error = step["ratio_error"]
                    _verify_first_ratio(first_ratio_error, self._model)
                seen.append(step)
                stopped = config.guard.target_kl is not None and step["policy/approxkl"] > config.guard.target_kl
                if stopped:
                    break
        return _mean(seen) | {"policy/first_ratio_error": first_ratio_error, "policy/stopped": float(stopped)}

    def _minibatches(self, num_micro_batches: int, update: int) -> Generator[tuple[int, list[int]]]:
        """Each minibatch's number in the whole run, and its micro-batches, epoch after epoch."""
        loss, split = self._config.loss, self._split
        size = num_micro_batches // loss.minibatches
        if num_micro_batches != size * loss.minibatches or num_micro_batches % split:
            raise InvariantError(
                f"{num_micro_batches} micro-batches do not make {loss.minibatches} equal minibatches in parts of "
                f"{split}: some would be left out"
            )
        for epoch in range(loss.epochs):
            whole = permutation(self._seed, "minibatches", update, epoch, size=num_micro_batches // split)
            order = [part for number in whole for part in range(number * split, (number + 1) * split)]
            first = (update * loss.epochs + epoch) * loss.minibatches
            for i in range(loss.minibatches):
                yield first + i, order[i * size : (i + 1) * size]

    def _learn_minibatch(
        self, minibatch: Sequence[Experience], number: int, *, kl_coefficient: float, moves_policy: bool
    ) -> dict[str, float]:
        """Accumulate one minibatch's gradient over its micro-batches and step; returns its metrics."""
        masks = [own.mb.is_response_BT for own in minibatch]
        num_tokens, num_responses = sum(int(mask.sum()) for mask in masks), sum(len(mask) for mask in masks)
        sums: dict[str, float] = {}
        ratio_error = 0.0
        for own, mask_BT in zip(minibatch, masks, strict=True):
            weights_BT = objective.loss_weights(
                mask_BT, average=self._config.loss.average, num_tokens=num_tokens, num_responses=num_responses
            )
            found, error = self._learn_micro_batch(
                own, weights_BT, kl_coefficient=kl_coefficient, moves_policy=moves_policy
            )
            ratio_error = max(ratio_error, error)
            for name, value in found.items():
                sums[name] = sums.get(name, 0.0) + value
        if self._texts is not None and moves_policy:
            sums["loss/ptx"] = self._learn_texts(self._texts, number)
        return {**sums, "optimizer/gradient_norm": self._actor_critic.step(), "ratio_error": ratio_error}

    def _learn_micro_batch(
        self, own: Experience, weights_BT: Tensor, *, kl_coefficient: float, moves_policy: bool
    ) -> tuple[dict[str, float], float]:
        """Add one micro-batch's gradient; returns its share of the minibatch's metrics, and the largest |ratio − 1|."""
        model, config, critic = self._model, self._config, self._actor_critic.critic
        mb = own.mb
        with model.role(POLICY, train=moves_policy):
            out = policy_pass(
                model,
                mb.batch,
                temperature=config.rollout.temperature,
                value_head=critic and critic.trunk_head,
                with_entropy=config.loss.entropy_bonus > 0,
                is_checkpointed=config.loss.gradient_checkpointing,
            )
            losses = self._policy_losses(out, own, weights_BT, kl_coefficient) if moves_policy else {}
            if out.values_BT is not None:
                losses["loss/value"] = self._value_loss(out.values_BT, own, weights_BT)
            self._backward(losses)
        if critic is not None and critic.has_adapter:
            with model.role(VALUE, train=True):
                values_BT = value_pass(model, critic.head, mb.batch, is_checkpointed=config.loss.gradient_checkpointing)
                losses["loss/value"] = self._value_loss(values_BT, own, weights_BT)
                self._backward({"loss/value": losses["loss/value"]})
        with torch.no_grad():
            clips = {"clip_low": config.loss.clip_low, "clip_high": config.loss.clip_high}
            log_ratio_BT = (out.logprobs_BT - mb.logprobs_BT) * mb.is_response_BT
            clipped_BT = objective.is_clipped(out.logprobs_BT, mb.logprobs_BT, **clips)
            metrics = {
                **losses,
                "policy/approxkl": (0.5 * log_ratio_BT.square() * weights_BT).sum(),
                "policy/clipfrac": (clipped_BT * weights_BT).sum(),
            }
            ratio_error = torch.expm1(log_ratio_BT).abs().max().item()
        return {name: value.item() for name, value in metrics.items()}, ratio_error

    def _policy_losses(
        self, out: PolicyPass, own: Experience, weights_BT: Tensor, kl_coefficient: float
    ) -> dict[str, Tensor]:
        config, mb, logprobs_BT = self._config, own.mb, out.logprobs_BT
        policy_BT = objective.policy_loss(
            logprobs_BT,
            mb.logprobs_BT,
            own.advantages_BT,
            clip_low=config.loss.clip_low,
            clip_high=config.loss.clip_high,
        )
        losses = {"loss/policy": (policy_BT * weights_BT).sum()}
        if config.kl.place == "loss":
            estimator = objective.kl_k2 if config.kl.used_estimator == "k2" else objective.kl_k3
            losses["loss/kl"] = (estimator(logprobs_BT, mb.ref_logprobs_BT) * weights_BT).sum() * kl_coefficient
        if out.entropy_BT is not None:
            losses["loss/entropy"] = -config.loss.entropy_bonus * (out.entropy_BT * weights_BT).sum()
        return losses

    def _value_loss(self, values_BT: Tensor, own: Experience, weights_BT: Tensor) -> Tensor:
        clip = self._config.critic.clip
        loss_BT = objective.value_loss(values_BT, own.mb.values_BT, own.returns_BT, clip=clip)
        return (loss_BT * weights_BT).sum()

    def _backward(self, losses: dict[str, Tensor]) -> None:
        """Add the gradient of their sum, the critic's loss times its coefficient."""
        terms = [self._config.critic.coefficient * v if name == "loss/value" else v for name, v in losses.items()]
        if not terms:
            return
        total = torch.stack(terms).sum()
        if not torch.isfinite(total):
            bad = {name: loss.item() for name, loss in losses.items() if not torch.isfinite(loss)} or total.item()
            raise InvariantError(f"not finite before the optimizer's step: {bad}; nothing was changed; {DIVERGED}")
        total.backward()

    def _learn_texts(self, texts: Texts, number: int) -> float:
        """Add the gradient of the language-model loss on some rows; returns the loss, its coefficient included."""
        loss_config = self._config.loss
        drawn = drawn_indices(self._seed, "ptx", number, num_drawn=loss_config.ptx_batch_size, size=len(texts.rows))
        rows = [texts.rows[i] for i in drawn]
        num_tokens = sum(sum(row.is_response) for row in rows)
        total, part = 0.0, loss_config.micro_batch_size // self._split
        for group in length_sorted_batches([len(row.ids) for row in rows], part):
            with self._model.role(POLICY, train=True):
                logprobs_N = text_pass(
                    self._model,
                    [rows[i] for i in group],
                    pad_id=texts.pad_id,
                    is_checkpointed=loss_config.gradient_checkpointing,
                )
                loss = -loss_config.ptx_coefficient * logprobs_N.sum() / num_tokens
                self._backward({"loss/ptx": loss})
            total += loss.item()
        return total


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
