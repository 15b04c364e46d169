"""What every section of the configuration is."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Schedule = Literal["constant", "linear", "cosine"]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class CheckpointsConfig(Section):
    """When a stage writes what a stopped run continues from. Nothing of it changes what comes out."""

    every: int | None = Field(default=None, ge=1, description="updates; in sft and reward optimizer steps")
    every_minutes: float | None = Field(default=5.0, gt=0, description="after the update in which they have passed")
    keep_last: int = Field(default=2, ge=1)


class BestCheckpointsConfig(CheckpointsConfig):
    """Of a stage that looks at held-out data on its way."""

    keep_best: int = Field(
        default=0, ge=0, description="besides the last ones those with the best look; then each look makes one"
    )


class PPOCheckpointsConfig(BestCheckpointsConfig):
    every: int | None = Field(default=1, ge=1, description="updates: one costs little beside a rollout")
