"""What every section of the configuration is."""

from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

Schedule = Literal["constant", "linear", "cosine"]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: object, info: ValidationInfo) -> object:
        """To pydantic true is 1; to whoever writes `updates: yes` it is not."""
        taken = _types_in(cls.model_fields[str(info.field_name)].annotation)
        if isinstance(value, bool) and bool not in taken and taken & {int, float}:
            raise ValueError("is no number; YAML reads yes, no, on, off, true and false as truth values")
        return value


def _types_in(annotation: Any) -> set[object]:
    inner = get_args(annotation)
    return {annotation} if not inner else {found for part in inner for found in _types_in(part)}


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
