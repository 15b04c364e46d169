"""Scalar heads on the trunk: our own modules in their own files (heads inside PEFT's modules_to_save get lost)."""

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from align.artifacts import read_json, write_json
from align.errors import ArtifactError


@dataclass(frozen=True)
class ScoreStatistics:
    """The reward model's own scale: its score's mean and spread on SFT responses to held-out prompts."""

    mean: float
    std: float
    num_responses: int


class ScalarHead(nn.Module):
    """hidden (..., H) in any dtype → (..., 1) in float32, computed in float32."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, hidden_size))
        self.bias = nn.Parameter(torch.zeros(1))

    def initialize(self, seed: int) -> "ScalarHead":
        """Normal with standard deviation 1/√(H+1), drawn from `seed` alone (Stiennon et al. 2020, appendix)."""
        generator = torch.Generator().manual_seed(seed)
        hidden_size = self.weight.shape[1]
        self.weight.data = torch.randn(1, hidden_size, generator=generator) / (hidden_size + 1) ** 0.5
        return self

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden.float(), self.weight, self.bias)


def save_head(head: ScalarHead, folder: Path, statistics: ScoreStatistics | None = None) -> None:
    """Write head.safetensors, and statistics.json if there are any, into an existing folder."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in head.state_dict().items()}
    save_file(tensors, folder / "head.safetensors")
    if statistics is not None:
        write_json(folder / "statistics.json", statistics.__dict__)


def load_head(folder: Path, *, device: torch.device) -> tuple[ScalarHead, ScoreStatistics | None]:
    """Read what save_head wrote. Raises ArtifactError if it is missing or is no head."""
    try:
        tensors = load_file(folder / "head.safetensors")
    except FileNotFoundError:
        raise ArtifactError(f"{folder} holds no head.safetensors; a reward model needs its head") from None
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{folder}/head.safetensors is damaged: {error}") from None
    if set(tensors) != {"weight", "bias"} or tensors["weight"].shape[0] != 1:
        raise ArtifactError(f"{folder}/head.safetensors holds {sorted(tensors)}, expected a scalar head: weight, bias")
    head = ScalarHead(tensors["weight"].shape[1])
    head.load_state_dict(tensors)
    statistics = None
    if (folder / "statistics.json").is_file():
        statistics = _read_statistics(folder / "statistics.json")
    return head.to(device).requires_grad_(False), statistics


def _read_statistics(path: Path) -> ScoreStatistics:
    values = cast("dict[str, float]", read_json(path))
    try:
        return ScoreStatistics(float(values["mean"]), float(values["std"]), int(values["num_responses"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{path} is damaged: {error!r}; it needs mean, std and num_responses") from None
