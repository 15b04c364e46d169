"""How a reward model scores: as the model that the trainer knows, and over episodes as PPO does."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from align.adapters import AdaptedModel
from align.episodes import Episode, collate, score_pass
from align.heads import ScalarHead
from data.batching import prompt_sorted_batches


@dataclass(frozen=True)
class Member:
    """One reward model of an ensemble, or the only one: an adapter on the resident base, and its head."""

    name: str  # of the adapter
    suffix: str  # of its folders: empty for the only one
    seed: int  # of its head, its shuffles and its dropout
    head: ScalarHead


class Scorer(PreTrainedModel):
    """The resident trunk with a head, as a model that RewardTrainer trains: no second copy of the base.

    Not a classifier of transformers, which half of its language models have none of; what it says to a batch is
    `stages.reward.batches.batch_scores`.
    """

    supports_gradient_checkpointing = True

    def __init__(self, model: AdaptedModel, head: ScalarHead) -> None:
        config = type(model.base.model.config).from_dict(model.base.model.config.to_dict())
        config.num_labels = 1
        super().__init__(config)
        self.base_model_prefix = model.base.model.base_model_prefix
        setattr(self, self.base_model_prefix, model.trunk)
        self.score = head


@torch.no_grad()
def score(model: AdaptedModel, member: Member, episodes: list[Episode], *, pad_id: int, batch_size: int) -> Tensor:
    """Scores (N,) on the CPU, in the order given."""
    scores_N = torch.zeros(len(episodes))
    with model.role(member.name):
        for group in prompt_sorted_batches([(e.prompt_ids, e.response_ids) for e in episodes], batch_size):
            batch = collate([episodes[i] for i in group], pad_id=pad_id, device=model.device)
            scores_N[group] = score_pass(model, member.head, batch).cpu()
    return scores_N
