"""From scores and KL to per-token rewards, and what that remembers from update to update."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from align.config import KLConfig, RewardsConfig
from align.rewards import RewardSources
from stages.ppo import objective
from stages.ppo.rollout import MicroBatch, Rollout


@dataclass(frozen=True)
class Shaped:
    """One tensor for each micro-batch of the rollout."""

    rewards: list[Tensor]  # (B, T)
    scores: list[Tensor]  # (B,), after normalising, clipping and penalties
    kl_coefficient: float  # in the rewards, or for the loss


class Shaper:
    """Owns the KL coefficient and the running moments of the score; both are saved with every checkpoint."""

    def __init__(
        self, config: RewardsConfig, kl: KLConfig, sources: RewardSources, *, max_response_length: int
    ) -> None:
        self._config = config
        self._kl = kl
        self._sources = sources
        self._max_response_length = max_response_length
        self._moments = objective.RunningMoments()
        self.kl_coefficient = kl.coefficient

    def shape(self, rollout: Rollout) -> Shaped:
        if self._config.normalize == "running":
            self._moments.add(torch.cat([self._sources.total(mb.scores) for mb in rollout.micro_batches]))
        scores = [self._shaped_scores(mb) for mb in rollout.micro_batches]
        in_reward = self.kl_coefficient if self._kl.place == "reward" else 0.0
        rewards = [
            objective.token_rewards(
                scores_B,
                objective.kl_k1(mb.logprobs_BT, mb.ref_logprobs_BT),
                mb.is_response_BT,
                kl_coefficient=in_reward,
            )
            for scores_B, mb in zip(scores, rollout.micro_batches, strict=True)
        ]
        if self._config.whiten:
            rewards = objective.whiten(rewards, [mb.is_response_BT for mb in rollout.micro_batches], shift=False)
        return Shaped(rewards, scores, self.kl_coefficient)

    def _shaped_scores(self, mb: MicroBatch) -> Tensor:
        """Normalised by all scores so far, or by the reward model's own scale (Stiennon et al. 2020, sec. 3.4)."""
        config, by_name = self._config, mb.scores
        if config.normalize == "running":
            normalized_B = self._moments.normalized(self._sources.total(by_name))
        else:
            normalized_B = self._sources.standardized(by_name)
        return objective.shaped_scores(
            normalized_B,
            mb.has_eos_B,
            mb.is_response_BT.sum(-1),
            clip=config.clip,
            missing_eos_penalty=config.missing_eos_penalty,
            token_penalty=config.length_penalty / self._max_response_length,
        )

    def adapt(self, kl: float, *, num_episodes: int) -> None:
        """Move the coefficient for the next update by the KL of this one, in nats a response."""
        if self._kl.controller == "adaptive":
            self.kl_coefficient = objective.adaptive_kl_coefficient(
                self.kl_coefficient, kl, target=self._kl.target, horizon=self._kl.horizon, num_episodes=num_episodes
            )

    def state(self) -> dict[str, float]:
        return {
            "kl_coefficient": self.kl_coefficient,
            "kl_coefficient_first": self._kl.coefficient,
            **asdict(self._moments),
        }

    def restore(self, state: Mapping[str, float]) -> None:
        """The coefficient is the config's, unless the controller has moved it on from there."""
        if self._kl.controller == "adaptive" and state["kl_coefficient_first"] == self._kl.coefficient:
            self.kl_coefficient = state["kl_coefficient"]
        self._moments = objective.RunningMoments(**{key: state[key] for key in ("count", "mean", "squares")})
