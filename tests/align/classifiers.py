"""A BERT-shaped sequence classifier with a tokenizer of its own, in a folder."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "day")


def write_classifier(folder: Path, *, labels: tuple[str, ...] = ("negative", "positive"), seed: int = 0) -> Path:
    """Random weights; `labels` of one name is a classifier with one output."""
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=64,
    )  # fmt: skip
    config.num_labels = len(labels)
    config.id2label = dict(enumerate(labels))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BertForSequenceClassification(config)
        torch.nn.init.normal_(model.classifier.weight, std=2.0)
        torch.nn.init.normal_(model.bert.embeddings.word_embeddings.weight, std=1.0)
    model.save_pretrained(folder)
    return folder
