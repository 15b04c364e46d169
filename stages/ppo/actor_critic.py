"""What PPO trains, and its state on disk: the policy adapter, the critic, the optimizer."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from align.adapters import AdaptedModel
from align.artifacts import Artifact, write_directory
from align.checkpoints import Checkpoint, optimizer_tensors, restore_optimizer
from align.config import CriticConfig, OptimizerConfig
from align.errors import InvariantError
from align.heads import ScalarHead, ScoreStatistics, save_head
from stages.ppo.objective import schedule_factor
from stages.ppo.rollout import POLICY, REFERENCE, REWARD, VALUE


class ActorCritic:
    """Owns the trained tensors and their optimizer. The critic is a head on the policy's trunk, or on an adapter of
    its own that starts as a copy of the reward adapter."""

    def __init__(
        self,
        model: AdaptedModel,
        reward_head: ScalarHead,
        statistics: ScoreStatistics,
        critic: CriticConfig,
        optimizer: OptimizerConfig,
    ) -> None:
        self._model = model
        self._config = optimizer
        self.critic_is_adapter = critic.kind == "adapter"
        model.add(POLICY, copy_of=REFERENCE)
        self.value_head = ScalarHead(model.hidden_size).to(model.device)
        if self.critic_is_adapter:
            model.add(VALUE, copy_of=REWARD)
            # Started from the reward head, with the score's mean and spread folded in: V starts as the shaped score.
            self.value_head.weight.data = reward_head.weight.data / statistics.std
            self.value_head.bias.data = (reward_head.bias.data - statistics.mean) / statistics.std
        policy = self._named(POLICY)
        value = {f"head/{name}": tensor for name, tensor in self.value_head.named_parameters()}
        if self.critic_is_adapter:
            value |= self._named(VALUE)
        self.names: dict[Tensor, str] = {tensor: name for name, tensor in {**policy, **value}.items()}
        rates = (optimizer.learning_rate, critic.learning_rate or optimizer.learning_rate)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [*group.values()], "lr": r, "peak": r}
                for group, r in zip((policy, value), rates, strict=True)
            ],
            betas=optimizer.betas,
            eps=1e-5,  # as in OpenAI baselines' PPO2; 1e-8 makes the first steps of tiny gradients too large
            weight_decay=optimizer.weight_decay,
        )

    def _named(self, adapter: str) -> dict[str, Tensor]:
        return {f"{adapter}/{key}": tensor for key, tensor in self._model.tensors(adapter).items()}

    def set_learning_rate(self, update: int, total: int) -> float:
        """Apply the schedule, a pure function of the update; returns the policy's rate."""
        config = self._config
        factor = schedule_factor(update, total, schedule=config.schedule, warmup=config.warmup_updates)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        return self.optimizer.param_groups[0]["lr"]

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
        self.optimizer.zero_grad(set_to_none=True)
        return norm.item()

    def checkpoint(self, step: int, state: dict[str, object]) -> Checkpoint:
        trained = {name: tensor for tensor, name in self.names.items()}
        return Checkpoint(step, {"trained": trained, "optimizer": optimizer_tensors(self.optimizer, self.names)}, state)

    def restore(self, checkpoint: Checkpoint) -> None:
        for tensor, name in self.names.items():
            tensor.data.copy_(checkpoint.groups["trained"][name])
        restore_optimizer(self.optimizer, self.names, checkpoint.groups["optimizer"])

    def save(self, folder: Path, *, step: int) -> tuple[Artifact, ...]:
        """Write adapter/ (the policy), head/ (the value head) and, for an adapter critic, value_adapter/."""

        def write(name: str, kind: str, fill: Callable[[Path], None]) -> Artifact:
            base = self._model.base_identity
            return write_directory(folder / name, fill, kind=kind, stage="ppo", step=step, base_identity=base)

        artifacts = [
            write("adapter", "adapter", lambda path: self._model.save(POLICY, path)),
            write("head", "head", lambda path: save_head(self.value_head, path)),
        ]
        if self.critic_is_adapter:
            artifacts.append(write("value_adapter", "value_adapter", lambda path: self._model.save(VALUE, path)))
        return tuple(artifacts)
