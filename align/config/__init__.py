"""The whole configuration: one tree of frozen pydantic models, checked before Ray or torch starts.

Unknown keys are refused and the nearest known one is named (`align.settings` loads files and overrides). Relative
paths resolve against the config file's own folder. Below a stage's entry, functions take sections or values, not
this tree.
"""

import os
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from align.config.ppo import (  # isort: skip # one statement: `ppo`'s sections can be imported from here, too
    AdvantageConfig as AdvantageConfig,
    CriticConfig as CriticConfig,
    GuardConfig as GuardConfig,
    KLConfig as KLConfig,
    OptimizerConfig as OptimizerConfig,
    PPOConfig as PPOConfig,
    RewardsConfig as RewardsConfig,
    RewardSourceConfig as RewardSourceConfig,
    RolloutConfig as RolloutConfig,
)
from align.config.section import (  # isort: skip
    BestCheckpointsConfig as BestCheckpointsConfig,
    CheckpointsConfig as CheckpointsConfig,
    PPOCheckpointsConfig as PPOCheckpointsConfig,
    Schedule,
    Section,
)

StageName = Literal["sft", "reward", "ppo"]


def expand_user(path: Path) -> Path:
    """With the home folder for ~; that of a user who is not known stays as it is."""
    return Path(os.path.expanduser(path))


class RunConfig(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="folder of this run under root")
    root: Annotated[Path, AfterValidator(expand_user)] = Field(
        default=Path("runs"), description="relative: under the folder the command is run in"
    )
    seed: int = Field(default=0, ge=0, lt=2**31)
    stages: tuple[StageName, ...] = Field(default=("sft", "reward", "ppo"), min_length=1)

    @model_validator(mode="after")
    def _stages_in_order(self) -> "RunConfig":
        order = ("sft", "reward", "ppo")
        if list(self.stages) != [stage for stage in order if stage in self.stages]:
            raise ValueError(f"stages must be distinct and in the order {', '.join(order)}")
        return self

    @property
    def folder(self) -> Path:
        return self.root / self.name


class BaseModelConfig(Section):
    model: str = Field(
        default="embedded", description="embedded, tiny:llama, tiny:gpt2, tiny:qwen2, a folder, or a hub id"
    )
    revision: str | None = Field(default=None, description="of a hub id: a commit, tag or branch")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="float32", description="auto: bfloat16 where the device computes faster in it, else float32"
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compile: bool = Field(
        default=False,
        description="decoder layers, in PPO and in decoding: faster after a minute or two; needs a C++ compiler. On a "
        "GPU, or a CPU without AVX-512, rows that begin alike no longer share that",
    )
    trust_remote_code: bool = False


class AdaptersConfig(Section):
    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1, description="in sft and reward; PPO always runs without")
    targets: Literal["all-linear", "attention", "mlp"] | tuple[str, ...] = "all-linear"
    layers: Literal["all"] | Annotated[int, Field(ge=1)] = Field(default="all", description="all, or the last n")


class SourceConfig(Section):
    path: Path | None = Field(
        default=None, description="a data set of align ingest, or a file of rows; samples:NAME for our own"
    )
    hub: str | None = Field(default=None, description="a hub data set's id")
    subset: str | None = None
    split: str = Field(default="train", description="of a hub data set, or of one of align ingest")
    revision: str | None = None
    limit: int | None = Field(default=None, ge=1, description="only the first n rows")

    @model_validator(mode="after")
    def _one_place(self) -> "SourceConfig":
        if (self.path is None) == (self.hub is None):
            raise ValueError("give either path or hub")
        return self


def _as_source(value: object) -> object:
    return {"path": value} if isinstance(value, str | Path) else value


Source = Annotated[SourceConfig, BeforeValidator(_as_source)]


class DatasetConfig(Section):
    train: Source
    held_out: Source | None = None
    held_out_fraction: float = Field(
        default=0.05, gt=0, lt=1, description="by hash of the prompt, if held_out is not given"
    )


class DataConfig(Section):
    sft: DatasetConfig | None = None
    reward: DatasetConfig | None = None
    ppo: DatasetConfig | None = None
    ptx: Source | None = Field(default=None, description="text or demonstrations for ppo.loss.ptx_coefficient")
    system_prompt: str | None = Field(
        default=None, description="states the norms; put before conversations without one"
    )
    max_reject_rate: float = Field(default=0.01, ge=0, le=1)


class SupervisedConfig(Section):
    """What SFT and reward training share. batch_size is in rows (pairs for reward) per optimizer step."""

    adapter: Path | None = Field(
        default=None, description="a PEFT folder to start from (or to use, if the stage is not run)"
    )
    epochs: float = Field(default=1.0, gt=0)
    batch_size: int = Field(default=16, ge=1)
    micro_batch_size: int = Field(default=8, ge=1)
    learning_rate: float = Field(default=2e-4, gt=0)
    schedule: Schedule = "linear"
    warmup_fraction: float = Field(default=0.05, ge=0, lt=1)
    max_length: int = Field(default=1024, ge=8, description="tokens of prompt and response together")
    gradient_checkpointing: bool = False

    @model_validator(mode="after")
    def _whole_micro_batches(self) -> "SupervisedConfig":
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}"
            )
        return self


class SFTConfig(SupervisedConfig):
    checkpoints: CheckpointsConfig = CheckpointsConfig()


class RewardObjectiveConfig(Section):
    kind: Literal["bradley-terry", "rao-kupper", "unpaired"] = Field(
        default="bradley-terry", description="pairs, pairs with ties, or one response and a verdict a row"
    )
    centering: float = Field(
        default=0.01,
        ge=0,
        description="weight of (r_chosen + r_rejected)^2, unpaired r^2: keeps scores near 0 (Eisenstein et al. 2023)",
    )
    tie_threshold: float = Field(
        default=3.0,
        gt=1,
        description="rao-kupper: θ of Rao & Kupper 1967; equal responses tie with probability (θ-1)/(θ+1)",
    )
    positive_weight: float | None = Field(
        default=None,
        gt=0,
        description="unpaired: of good rows, bad ones weigh 1; not given: n/(2 n_class) each (King & Zeng 2001)",
    )

    @model_validator(mode="after")
    def _no_setting_without_effect(self) -> "RewardObjectiveConfig":
        if self.kind != "rao-kupper" and self.tie_threshold != 3.0:
            raise ValueError(f"tie_threshold is for kind rao-kupper, and kind is {self.kind}")
        if self.kind != "unpaired" and self.positive_weight is not None:
            raise ValueError(f"positive_weight is for kind unpaired, and kind is {self.kind}")
        return self


class EarlyStoppingConfig(Section):
    """Goodfellow et al. 2016, algorithm 7.1: keep the state that is best on held-out data, stop when none is better."""

    every: int | None = Field(
        default=None, ge=1, description="optimizer steps between looks at the held-out loss; not given: never"
    )
    patience: int = Field(default=2, ge=1, description="looks without a new best before training stops")


class RewardConfig(SupervisedConfig):
    objective: RewardObjectiveConfig = RewardObjectiveConfig()
    checkpoints: BestCheckpointsConfig = BestCheckpointsConfig()
    ensemble: int = Field(
        default=1,
        ge=1,
        le=16,
        description="members, each an adapter and a head on the one base (Coste et al. 2023, Zhai et al. 2023)",
    )
    early_stopping: EarlyStoppingConfig = EarlyStoppingConfig()

    @model_validator(mode="after")
    def _looks_tell_the_best(self) -> "RewardConfig":
        if self.checkpoints.keep_best and self.early_stopping.every is None:
            raise ValueError("checkpoints.keep_best is by looks at held-out data: give early_stopping.every, too")
        return self


class EvaluationConfig(Section):
    prompts: int = Field(default=64, ge=2, description="held-out prompts at most")
    samples: int = Field(default=4, ge=1, description="answers a prompt")
    gold: Literal["sentiment"] | None = Field(default=None, description="a known ground truth, where the task has one")
    show: int = Field(default=3, ge=0, description="prompts shown with the answer before and after")


def _address(text: str) -> str:
    if re.fullmatch(r"local|auto|\w+://.+|.+:\d+", text) is None:
        raise ValueError("must be local, auto, HOST:PORT or ray://HOST:PORT")
    return text


class ClusterConfig(Section):
    address: Annotated[str, AfterValidator(_address)] = Field(
        default="local",
        description="local: a Ray of our own (in a Ray job: the job's); auto, or host:port",
    )
    cpus: int | None = Field(
        default=None, ge=1, description="of the worker; all that the cluster's node has, if not given"
    )
    gpus: int | None = Field(
        default=None,
        ge=0,
        le=1,
        description="of the worker; one if there is one, if not given; with 0 it sees none unless base.device is cuda",
    )
    placement_timeout_seconds: float = Field(default=10.0, gt=0)
    max_failures: int = Field(
        default=2, ge=0, description="deaths of the worker in a step after which it is started anew and goes on"
    )


class TrackingConfig(Section):
    tensorboard: bool = False


class Config(Section):
    run: RunConfig
    base: BaseModelConfig = BaseModelConfig()
    adapters: AdaptersConfig = AdaptersConfig()
    data: DataConfig = DataConfig()
    sft: SFTConfig = SFTConfig()
    reward: RewardConfig = RewardConfig()
    ppo: PPOConfig = PPOConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    cluster: ClusterConfig = ClusterConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _stages_have_data(self) -> "Config":
        for stage in self.run.stages:
            if getattr(self.data, stage) is None:
                raise ValueError(f"run.stages names {stage}, so data.{stage} is needed")
        has_model = "reward" in self.run.stages or self.reward.adapter is not None
        if "ppo" in self.run.stages and self.ppo.rewards.uses_reward_model and not has_model:
            raise ValueError("ppo needs a reward model: put reward into run.stages, or give reward.adapter")
        if "ppo" in self.run.stages and bool(self.ppo.loss.ptx_coefficient) != (self.data.ptx is not None):
            raise ValueError("data.ptx and ppo.loss.ptx_coefficient go together: give both or neither")
        return self
