"""Batches of what was said: every response behind its own copy of the prompt, or both of a pair behind the same one.

Both responses of a pair answer the same prompt, so most of what separate sequences compute of it is computed twice. In
a shared row they stand one after the other behind one prompt; positions of the second begin again where the prompt
ends, and a mask keeps it from seeing the first. Scores and gradients are the same but for rounding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor, nn

from align.adapters import AdaptedModel
from data.batching import right_pad

_SHARED_LENGTH = 512  # tokens of a row, at most: a mask is (S, S), and attention under it takes twice the work


class TrainerRow(TypedDict):
    """A row as RewardTrainer takes it: it tokenizes again what lacks one of the first two columns."""

    chosen_ids: list[int]  # prompt and response
    rejected_ids: list[int]  # likewise; empty for a verdict, which has one response
    prompt_length: int  # tokens
    labels: float  # the probability that chosen is preferred; of a verdict, 1 for good
    margin: float  # 0 if there is none
    length: int  # tokens of both responses and one prompt: rows of like length are batched together


@dataclass(frozen=True)
class Collator:
    """From rows to what `batch_scores` takes, with the labels and margins (B,).

    It is under "labels" that Trainer counts the rows of an optimizer step.
    """

    pad_id: int
    dtype: torch.dtype  # of the base, and so of the mask that is added
    is_sharing: bool  # whether pairs may share a prompt

    def __call__(self, rows: Sequence[TrainerRow]) -> dict[str, Tensor]:
        is_shared = self.is_sharing and all(len(row["rejected_ids"]) for row in rows)
        is_shared = is_shared and max(map(_shared_length, rows)) <= _SHARED_LENGTH
        sides = [ids for side in ("chosen_ids", "rejected_ids") for row in rows if (ids := row[side])]
        return {
            **(self._shared(rows) if is_shared else self._separate(sides)),
            "num_tokens": torch.tensor(sum(map(len, sides))),
            "labels": torch.tensor([row["labels"] for row in rows]),
            "margin": torch.tensor([row["margin"] for row in rows]),
        }

    def _separate(self, sides: list[list[int]]) -> dict[str, Tensor]:
        ids_NS, is_token_NS = right_pad(sides, self.pad_id, "cpu")
        return {
            "input_ids": ids_NS,
            "attention_mask": is_token_NS.long(),
            "rows": torch.arange(len(sides)),
            "last": torch.tensor([len(ids) - 1 for ids in sides]),
        }

    def _shared(self, rows: Sequence[TrainerRow]) -> dict[str, Tensor]:
        sequences = [row["chosen_ids"] + row["rejected_ids"][row["prompt_length"] :] for row in rows]
        ids_BS, is_token_BS = right_pad(sequences, self.pad_id, "cpu")
        at_S = torch.arange(ids_BS.shape[1])
        prompt_B1 = torch.tensor([[row["prompt_length"]] for row in rows])
        chosen_B1 = torch.tensor([[len(row["chosen_ids"])] for row in rows])
        is_second_BS = at_S >= chosen_B1
        is_first_BS = (at_S >= prompt_B1) & ~is_second_BS
        sees_BSS = (at_S[:, None] >= at_S) & ~(is_second_BS[:, :, None] & is_first_BS[:, None, :])
        last = torch.tensor([len(row["chosen_ids"]) - 1 for row in rows] + [len(ids) - 1 for ids in sequences])
        return {
            "input_ids": ids_BS,
            "position_ids": (at_S - is_second_BS * (chosen_B1 - prompt_B1)) * is_token_BS,
            "attention_mask": torch.where(sees_BSS, 0.0, torch.finfo(self.dtype).min).to(self.dtype)[:, None],
            "rows": torch.arange(len(rows)).repeat(2),
            "last": last,
        }


def batch_scores(model: AdaptedModel, head: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Scores (N,) under the present role: of all chosen responses of a batch, then of all rejected ones."""
    # the head first, as classifiers of transformers have it
    return head(_hidden(model, batch))[batch["rows"], batch["last"], 0]


@torch.no_grad()
def can_share(model: AdaptedModel) -> bool:
    """Whether the base says of two responses behind one prompt what it says of each behind its own.

    It does not if a layer passes on by other ways than attention under our mask, as recurrent layers do, or if it has
    a window of its own, which our mask would widen.
    """
    config = model.base.model.config.get_text_config()
    windows = (getattr(config, key, None) for key in ("sliding_window", "attention_chunk_size"))
    if any(window is not None and window < _SHARED_LENGTH for window in windows):
        return False
    prompt, chosen, rejected = [1, 2, 3], [4, 5, 6, 7], [8, 9]
    row = TrainerRow(
        chosen_ids=prompt + chosen, rejected_ids=prompt + rejected, prompt_length=3, labels=1.0, margin=0.0, length=9
    )
    found: list[Tensor] = []
    for is_sharing in (True, False):
        batch = Collator(0, model.base.dtype, is_sharing)([row])
        try:
            hidden_BSH = _hidden(model, {key: tensor.to(model.device) for key, tensor in batch.items()})
        except (ValueError, TypeError, RuntimeError, IndexError):  # it takes no such mask
            return False
        found.append(hidden_BSH[batch["rows"], batch["last"]].float())
    tolerance = torch.finfo(model.base.dtype).eps ** 0.5  # relative; SmolLM2 with the wrong positions is at 0.12
    return bool(((found[0] - found[1]).norm(dim=-1) <= tolerance * found[1].norm(dim=-1)).all())


def _hidden(model: AdaptedModel, batch: dict[str, Tensor]) -> Tensor:
    inputs = {key: batch[key] for key in ("input_ids", "position_ids", "attention_mask") if key in batch}
    return model.trunk(**inputs, use_cache=False).last_hidden_state


def _shared_length(row: TrainerRow) -> int:
    return len(row["chosen_ids"]) + len(row["rejected_ids"]) - row["prompt_length"]
