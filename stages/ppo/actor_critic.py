"""What PPO trains, and its state on disk: the policy adapter, the critic, the optimizer."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from align.adapters import AdaptedModel
from align.artifacts import Artifact
from align.checkpoints import Checkpoint, optimizer_tensors, restore_optimizer
from align.config import CriticConfig, OptimizerConfig
from align.context import StageContext
from align.errors import InvariantError
from align.heads import ScalarHead, ScoreStatistics, save_head
from align.rewards import RewardModel
from stages.ppo.objective import schedule_factor
from stages.ppo.rollout import POLICY, REFERENCE, VALUE, Critic

# How much faster than the policy a critic learns unless told: at the policy's own rate it stays worse than a constant
# (tests.benchmarks learning-parity).
_FASTER = {"head": 10.0, "adapter": 3.0}


class ActorCritic:
    """Owns the trained tensors and their optimizer. The critic is a head on the policy's trunk, or on an adapter of
    its own that starts as a copy of the reward adapter, or of `sft`; with `critic` None there is none.

    Args:
        start: the reward model that an adapter critic starts from, and the scale that its score is shaped by; without
            one it starts from `sft`, with V = 0.
    """

    def __init__(
        self,
        model: AdaptedModel,
        critic: CriticConfig | None,
        optimizer: OptimizerConfig,
        *,
        start: tuple[RewardModel, ScoreStatistics] | None = None,
    ) -> None:
        self._model = model
        self._config = optimizer
        model.add(POLICY, copy_of=REFERENCE)
        groups, rates = [self._named(POLICY)], [optimizer.learning_rate]
        self.critic: Critic | None = None
        if critic is not None:
            self.critic = Critic(ScalarHead(model.hidden_size).to(model.device), critic.kind == "adapter")
            value: dict[str, Tensor] = {f"head/{n}": t for n, t in self.critic.head.named_parameters()}
            if self.critic.has_adapter:
                value |= self._start_value_adapter(self.critic.head, start)
            groups.append(value)
            rates.append(critic.learning_rate or _FASTER[critic.kind] * optimizer.learning_rate)
        self.names: dict[Tensor, str] = {tensor: name for group in groups for name, tensor in group.items()}
        self.optimizer = torch.optim.AdamW(
            [{"params": [*group.values()], "lr": r, "peak": r} for group, r in zip(groups, rates, strict=True)],
            betas=optimizer.betas,
            eps=1e-5,  # as in OpenAI baselines' PPO2; 1e-8 makes the first steps of tiny gradients too large
            weight_decay=optimizer.weight_decay,
            fused=True,  # one pass over a tensor and its moments, a quarter of the time on a CPU
        )

    def _start_value_adapter(
        self, head: ScalarHead, start: tuple[RewardModel, ScoreStatistics] | None
    ) -> dict[str, Tensor]:
        """The reward model itself, with the score's mean and spread folded in: V starts as the shaped score."""
        self._model.add(VALUE, copy_of=start[0].adapter if start is not None else REFERENCE)
        if start is not None:
            own, scale = start
            head.weight.data = own.head.weight.data / scale.std
            head.bias.data = (own.head.bias.data - scale.mean) / scale.std
        return self._named(VALUE)

    def _named(self, adapter: str) -> dict[str, Tensor]:
        return {f"{adapter}/{key}": tensor for key, tensor in self._model.tensors(adapter).items()}

    def set_learning_rate(self, update: int, total: int) -> float:
        """Apply the schedule, a pure function of the update; returns the policy's rate."""
        config = self._config
        factor = schedule_factor(update, total, schedule=config.schedule, warmup=config.warmup_updates)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        return self.optimizer.param_groups[0]["lr"]

    @contextmanager
    def gradients(self, *, moves_policy: bool) -> Generator[None]:
        """Hold the gradients of what learns, from 0 on. They are made ahead of all passes: one that came up amid
        activations would stay between them when these are freed, and a CPU's heap be a quarter larger for it."""
        for tensor, name in self.names.items():
            if moves_policy or not name.startswith(f"{POLICY}/"):
                tensor.grad = torch.zeros_like(tensor)
        try:
            yield
        finally:
            self.optimizer.zero_grad(set_to_none=True)

    def step(self) -> float:
        """Clip the gradients together and step; returns their norm before. Raises InvariantError, before anything is
        changed, if it is not finite."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self._config.max_gradient_norm)
        if not torch.isfinite(norm):
            raise InvariantError(
                f"gradient norm is {norm.item()} before the optimizer's step; nothing was changed. Lower "
                "ppo.optimizer.learning_rate, or look at the last lines of metrics.jsonl."
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        return norm.item()

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of every trained tensor, on the CPU."""
        return {name: tensor.detach().cpu().clone() for tensor, name in self.names.items()}

    def put_back(self, trained: Mapping[str, Tensor]) -> None:
        for tensor, name in self.names.items():
            tensor.data.copy_(trained[name])

    def checkpoint_groups(self) -> dict[str, Mapping[str, Tensor]]:
        return {"trained": self.snapshot(), "optimizer": optimizer_tensors(self.optimizer, self.names)}

    def restore(self, checkpoint: Checkpoint) -> None:
        self.put_back(checkpoint.groups["trained"])
        restore_optimizer(self.optimizer, self.names, checkpoint.groups["optimizer"])

    def save(self, context: StageContext, *, step: int) -> tuple[Artifact, ...]:
        """Write adapter/ (the policy) and, of a critic, head/ and its own value_adapter/."""
        write = partial(context.write, step=step)
        artifacts = [write("adapter", "adapter", lambda path: self._model.save(POLICY, path))]
        critic = self.critic
        if critic is not None:
            artifacts.append(write("head", "head", lambda path: save_head(critic.head, path)))
        if critic is not None and critic.has_adapter:
            artifacts.append(write("value_adapter", "value_adapter", lambda path: self._model.save(VALUE, path)))
        return tuple(artifacts)
