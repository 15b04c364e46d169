"""How a reward model scores: as the classifier that the trainer knows, and over episodes as PPO does."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from align.adapters import AdaptedModel
from align.episodes import Episode, collate, score_pass
from align.errors import InvariantError
from align.heads import ScalarHead
from data.batching import prompt_sorted_batches


@dataclass(frozen=True)
class Member:
    """One reward model of an ensemble, or the only one: an adapter on the resident base, and its head."""

    name: str  # of the adapter
    suffix: str  # of its folders: empty for the only one
    seed: int  # of its head, its shuffles and its dropout
    head: ScalarHead


def scorer_on_trunk(model: AdaptedModel, head: ScalarHead, *, pad_id: int) -> PreTrainedModel:
    """A sequence classifier of transformers around the resident trunk and our head: no second copy of the base.

    Its forward reads the score at the last token that is not `pad_id`; every row ends in EOS, which pad never is, so
    that is the real last token.
    """
    config = type(model.base.model.config).from_dict(model.base.model.config.to_dict())
    config.num_labels = 1
    config.pad_token_id = pad_id
    with torch.device("meta"):
        classifier = AutoModelForSequenceClassification.from_config(config)
    setattr(classifier, classifier.base_model_prefix, model.trunk)
    classifier.score = head
    left = [name for name, tensor in (*classifier.named_parameters(), *classifier.named_buffers()) if tensor.is_meta]
    if left:
        raise InvariantError(f"{type(classifier).__name__} keeps weights of its own beside trunk and score: {left}")
    return classifier


@torch.no_grad()
def score(model: AdaptedModel, member: Member, episodes: list[Episode], *, pad_id: int, batch_size: int) -> Tensor:
    """Scores (N,) on the CPU, in the order given."""
    scores_N = torch.zeros(len(episodes))
    with model.role(member.name):
        for group in prompt_sorted_batches([(e.prompt_ids, e.response_ids) for e in episodes], batch_size):
            batch = collate([episodes[i] for i in group], pad_id=pad_id, device=model.device)
            scores_N[group] = score_pass(model, member.head, batch).cpu()
    return scores_N
