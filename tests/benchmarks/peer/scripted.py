"""A scripted reward in the shape that the peer asks of a reward model."""

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor, nn


def arbitrary_score(ids: list[int]) -> float:
    """Some number in [−2, 2) that differs from row to row."""
    return (sum((i + 1) * token for i, token in enumerate(ids)) % 997) / 250 - 2


class ScriptedReward(nn.Module):
    """Looks to TRL's `get_reward` like a sequence classifier: a backbone whose last hidden state holds at every
    position what `score_row` says of the whole row, and a `score` that hands it on. So TRL finds the same reward at
    whatever token it looks."""

    base_model_prefix = "backbone"

    def __init__(self, score_row: Callable[[list[int]], float], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.backbone = _Backbone(score_row, dtype)
        self.score = nn.Identity()


class _Backbone(nn.Module):
    def __init__(self, score_row: Callable[[list[int]], float], dtype: torch.dtype) -> None:
        super().__init__()
        self._score_row = score_row
        self._dtype = dtype

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: object) -> SimpleNamespace:
        """`score_row` is given a row's tokens without its padding, prompt and response together."""
        rows = [ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)]
        scores = torch.tensor([self._score_row(row) for row in rows], dtype=self._dtype, device=input_ids.device)
        return SimpleNamespace(hidden_states=(scores[:, None, None].expand(*input_ids.shape, 1),))
