"""The sections of `ppo`: rollout, kl, rewards, advantage, critic, loss, optimizer, guard."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from align.config.section import PPOCheckpointsConfig, Schedule, Section


class RolloutConfig(Section):
    episodes: int = Field(default=64, ge=1, description="an update")
    responses_per_prompt: int = Field(default=1, ge=1, description="of the episodes; rloo and grpo need at least 2")
    temperature: float = Field(default=1.0, gt=0)
    top_k: int = Field(
        default=0, ge=0, description="0 is off; on, samples leave the distribution that is trained: warned of"
    )
    top_p: float = Field(default=1.0, gt=0, le=1, description="1 is off; on, as for top_k")
    min_response_length: int = Field(default=0, ge=0, description="EOS is withheld before; as for top_k")
    max_prompt_length: int = Field(default=512, ge=1, description="tokens; longer prompts are rejected and counted")
    max_response_length: int = Field(default=128, ge=1, description="tokens")
    batch_size: int = Field(default=32, ge=1, description="episodes generated side by side")

    @model_validator(mode="after")
    def _answers_can_end(self) -> "RolloutConfig":
        if self.min_response_length > self.max_response_length:
            raise ValueError(
                f"min_response_length {self.min_response_length} is above max_response_length "
                f"{self.max_response_length}: no answer could end"
            )
        return self


class KLConfig(Section):
    coefficient: float = Field(default=0.05, ge=0, description="of the penalty; where the adaptive controller begins")
    place: Literal["reward", "loss"] = Field(
        default="reward", description="subtracted per token, or a term of the loss"
    )
    estimator: Literal["k1", "k2", "k3"] | None = Field(default=None, description="k1 in the reward, k2 in the loss")
    controller: Literal["fixed", "adaptive"] = "fixed"
    target: float = Field(default=6.0, gt=0, description="nats a response, of the adaptive controller")
    horizon: int = Field(default=10_000, ge=1, description="episodes, of the adaptive controller")

    @property
    def used_estimator(self) -> Literal["k1", "k2", "k3"]:
        return self.estimator or ("k1" if self.place == "reward" else "k2")

    @model_validator(mode="after")
    def _estimator_fits_its_place(self) -> "KLConfig":
        if self.place == "loss" and self.estimator == "k1":
            raise ValueError("k1 in the loss has an expected gradient of 0, so it holds nothing back: use k2 there")
        if self.place == "reward" and self.estimator in ("k2", "k3"):
            raise ValueError(
                f"{self.estimator} in the reward has a gradient that is off by more than 100 %: use k1 there, or "
                "place: loss"
            )
        return self


class RewardSourceConfig(Section):
    """One of what scores an episode; the scores are weighted and summed."""

    kind: Literal["reward", "classifier", "function"] = Field(
        default="reward", description="reward: the reward stage's"
    )
    name: str | None = Field(
        default=None, pattern=r"^[a-z][a-z0-9_]*$", description="in the logs; the kind if not given"
    )
    weight: float = 1.0
    model: str | None = Field(default=None, description="classifier: a folder or hub id of a sequence classifier")
    revision: str | None = None
    label: str | None = Field(default=None, description="classifier: whose log-odds are the score; none if it has one")
    sees: Literal["response", "both"] = Field(default="response", description="classifier: or prompt and response")
    function: str | None = Field(
        default=None, pattern=r"^[\w.]+:\w+$", description="module:function, (prompt, response) -> float"
    )
    timeout_seconds: float = Field(default=10.0, gt=0, description="function: of one call")

    @property
    def label_in_logs(self) -> str:
        return self.name or self.kind

    @model_validator(mode="after")
    def _what_its_kind_needs(self) -> "RewardSourceConfig":
        takes = {"classifier": ("model", "revision", "label", "sees"), "function": ("function", "timeout_seconds")}
        own, fields = takes.get(self.kind, ()), type(self).model_fields
        given = [key for keys in takes.values() for key in keys if getattr(self, key) != fields[key].default]
        if own and own[0] not in given:
            raise ValueError(f"a reward source of kind {self.kind} needs {own[0]}; given: {', '.join(given) or 'none'}")
        if stray := [key for key in given if key not in own]:
            raise ValueError(f"a reward source of kind {self.kind} takes no {', '.join(stray)}")
        return self


class RewardsConfig(Section):
    sources: tuple[RewardSourceConfig, ...] = Field(default=(RewardSourceConfig(),), min_length=1)
    ensemble: Literal["mean", "min", "mean-std"] = Field(default="mean", description="of reward.ensemble's members")
    ensemble_penalty: float = Field(default=1.0, ge=0, description="λ of mean-std: mean − λ·std over the members")
    normalize: Literal["model", "running", "none"] = Field(
        default="model", description="by each reward model's own mean and spread on SFT samples, or the run's so far"
    )
    clip: float | None = Field(default=5.0, gt=0, description="of the (normalised) score")
    missing_eos_penalty: float = Field(default=1.0, ge=0, description="taken from the score of a response without EOS")
    length_penalty: float = Field(
        default=0.0, ge=0, description="taken from the score of a response of max_response_length, linear below"
    )
    whiten: bool = Field(default=False, description="per-token rewards scaled to variance 1 over the rollout")

    @model_validator(mode="after")
    def _names_differ(self) -> "RewardsConfig":
        names = [source.label_in_logs for source in self.sources]
        if len(set(names)) < len(names):
            raise ValueError(f"reward sources need distinct names, these have {', '.join(names)}")
        if sum(source.kind == "reward" for source in self.sources) > 1:
            raise ValueError("only one reward source can be of kind reward; an ensemble counts as one")
        return self

    @property
    def uses_reward_model(self) -> bool:
        return any(source.kind == "reward" for source in self.sources)


class AdvantageConfig(Section):
    estimator: Literal["gae", "rloo", "grpo"] = Field(default="gae", description="rloo and grpo have no critic")
    gamma: float = Field(default=1.0, gt=0, le=1, description="gae")
    lam: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="gae; below 1 leans on the critic, which learnt more slowly (learning-parity)",
    )
    whiten: bool | None = Field(default=None, description="over the rollout; if not given, for gae only")

    @property
    def is_whitened(self) -> bool:
        return self.estimator == "gae" if self.whiten is None else self.whiten


class CriticConfig(Section):
    kind: Literal["head", "adapter"] = "head"
    coefficient: float = Field(default=0.1, ge=0, description="of the value loss")
    clip: float | None = Field(default=0.2, gt=0)
    learning_rate: float | None = Field(
        default=None, gt=0, description="if not given, ten times the optimizer's for a head, three times for an adapter"
    )
    warmup_updates: int = Field(default=0, ge=0, description="in which the critic learns and the policy stays")


class LossConfig(Section):
    epochs: int = Field(default=4, ge=1)
    minibatches: int = Field(default=4, ge=1)
    micro_batch_size: int = Field(default=8, ge=1, description="episodes")
    gradient_checkpointing: bool = Field(
        default=False, description="keep layer inputs alone for the backward pass: less memory, a third more work"
    )
    clip_low: float = Field(default=0.2, gt=0, lt=1)
    clip_high: float = Field(default=0.2, gt=0)
    average: Literal["token", "sequence"] = Field(
        default="token", description="over all tokens of a minibatch alike, or first within each response"
    )
    entropy_bonus: float = Field(default=0.0, ge=0, description="coefficient, of nats a token")
    ptx_coefficient: float = Field(default=0.0, ge=0, description="of the language-model loss on data.ptx (PPO-ptx)")
    ptx_batch_size: int = Field(default=8, ge=1, description="rows of data.ptx a minibatch")
    ptx_max_length: int = Field(default=512, ge=8, description="tokens of a row of data.ptx")


class OptimizerConfig(Section):
    learning_rate: float = Field(default=1e-4, gt=0)
    schedule: Schedule = "linear"
    warmup_updates: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    max_gradient_norm: float = Field(default=1.0, gt=0)


class GuardConfig(Section):
    target_kl: float | None = Field(
        default=None, gt=0, description="ends an update's epochs when policy/approxkl passes it"
    )
    every: int | None = Field(
        default=None, ge=1, description="updates between looks at the held-out score; off if none"
    )
    prompts: int = Field(default=32, ge=1, description="held-out prompts looked at, the last ones")
    patience: int | None = Field(default=None, ge=1, description="stops after n looks in a row below the best")
    max_kl: float | None = Field(default=None, gt=0, description="stops when objective/kl passes it; nats a response")

    @model_validator(mode="after")
    def _stops_know_the_best(self) -> "GuardConfig":
        if self.every is None and (self.patience is not None or self.max_kl is not None):
            raise ValueError(
                "patience and max_kl stop the run and keep the best of what was looked at: give every, too"
            )
        return self


class PPOConfig(Section):
    updates: int = Field(default=100, ge=1)
    checkpoints: PPOCheckpointsConfig = PPOCheckpointsConfig()
    rollout: RolloutConfig = RolloutConfig()
    kl: KLConfig = KLConfig()
    rewards: RewardsConfig = RewardsConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    critic: CriticConfig = CriticConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    guard: GuardConfig = GuardConfig()

    @model_validator(mode="after")
    def _whole_minibatches(self) -> "PPOConfig":
        per_minibatch = self.loss.minibatches * self.loss.micro_batch_size
        if self.rollout.episodes % per_minibatch:
            raise ValueError(
                f"rollout.episodes {self.rollout.episodes} is not a multiple of "
                f"loss.minibatches × loss.micro_batch_size = {per_minibatch}"
            )
        return self

    @model_validator(mode="after")
    def _looks_tell_the_best(self) -> "PPOConfig":
        if self.checkpoints.keep_best and self.guard.every is None:
            raise ValueError("checkpoints.keep_best is by looks at held-out prompts: give guard.every, too")
        return self

    @model_validator(mode="after")
    def _whole_groups(self) -> "PPOConfig":
        responses, estimator = self.rollout.responses_per_prompt, self.advantage.estimator
        if estimator != "gae" and responses < 2:
            raise ValueError(
                f"advantage.estimator {estimator} compares a prompt's responses: rollout.responses_per_prompt ≥ 2"
            )
        if self.rollout.episodes % responses:
            raise ValueError(
                f"rollout.episodes {self.rollout.episodes} is not a multiple of responses_per_prompt {responses}"
            )
        return self
