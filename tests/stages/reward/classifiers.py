"""A reward model as transformers has it, for what ours is held against."""

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from align.adapters import AdaptedModel
from align.heads import ScalarHead


def classifier_on_trunk(model: AdaptedModel, head: ScalarHead, *, pad_id: int) -> PreTrainedModel:
    """Around the resident trunk and the head. Its forward reads the score at the last token that is not `pad_id`."""
    config = type(model.base.model.config).from_dict(model.base.model.config.to_dict())
    config.num_labels = 1
    config.pad_token_id = pad_id
    with torch.device("meta"):
        classifier = AutoModelForSequenceClassification.from_config(config)
    setattr(classifier, classifier.base_model_prefix, model.trunk)
    classifier.score = head
    return classifier
