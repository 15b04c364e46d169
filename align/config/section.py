"""What every section of the configuration is."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

Schedule = Literal["constant", "linear", "cosine"]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
