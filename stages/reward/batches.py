"""Batches of what was said, each response behind its prompt: both of a pair begin alike, and share what they do."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor, nn

from align.adapters import AdaptedModel
from data.batching import right_pad


class TrainerRow(TypedDict):
    """A row as RewardTrainer takes it: it tokenizes again what lacks one of the first two columns."""

    chosen_ids: list[int]  # prompt and response
    rejected_ids: list[int]  # likewise; empty for a verdict, which has one response
    labels: float  # the probability that chosen is preferred; of a verdict, 1 for good
    margin: float  # 0 if there is none
    length: int  # tokens of both responses and one prompt: rows of like length are batched together


@dataclass(frozen=True)
class Collator:
    """From B rows to what `batch_scores` takes, with the labels and margins (B,).

    It is under "labels" that Trainer counts the rows of an optimizer step.
    """

    pad_id: int

    def __call__(self, rows: Sequence[TrainerRow]) -> dict[str, Tensor]:
        sides = [ids for side in ("chosen_ids", "rejected_ids") for row in rows if (ids := row[side])]
        ids_NS, is_token_NS = right_pad(sides, self.pad_id, "cpu")
        return {
            "input_ids": ids_NS,
            "attention_mask": is_token_NS.long(),
            "labels": torch.tensor([row["labels"] for row in rows]),
            "margin": torch.tensor([row["margin"] for row in rows]),
        }


def batch_scores(model: AdaptedModel, head: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Scores (N,) under the present role: of all chosen responses of a batch, then of all rejected ones."""
    is_token_NS = batch["attention_mask"].bool()
    hidden_NSH, last_N = model.plain_hidden(batch["input_ids"], is_token_NS), is_token_NS.sum(1) - 1
    # the head first, as classifiers of transformers have it
    return head(hidden_NSH)[torch.arange(len(last_N), device=last_N.device), last_N, 0]
