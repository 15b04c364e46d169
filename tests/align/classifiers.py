"""A BERT-shaped sequence classifier with a tokenizer of its own, in a folder."""

from pathlib import Path
from typing import Literal

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
WORDS = (*SPECIAL, "good", "bad", "day")
LETTERS = (*SPECIAL, *"abcdefghijklmnopqrstuvwxyz")


def write_classifier(
    folder: Path,
    *,
    labels: tuple[str, ...] = ("negative", "positive"),
    seed: int = 0,
    letters: bool = False,
    problem_type: Literal["multi_label_classification"] | None = None,
) -> Path:
    """Random weights; `labels` of one name is a classifier with one output; it reads words, or `letters`."""
    vocabulary = LETTERS if letters else WORDS
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated") if letters else pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=64,
    )  # fmt: skip
    config.num_labels, config.initializer_range = len(labels), 0.2  # wide enough that words count
    config.id2label = dict(enumerate(labels))
    config.problem_type = problem_type
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BertForSequenceClassification(config)
    model.save_pretrained(folder)
    return folder


def teach_letters(folder: Path, steps: int = 300) -> Path:
    """Train a classifier that reads letters to find small letters positive and everything else negative."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = BertForSequenceClassification.from_pretrained(folder).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        is_letter_BT = torch.rand(16, 8, generator=generator) < torch.rand(16, 1, generator=generator)
        letters_BT = torch.randint(ord("a"), ord("z") + 1, (16, 8), generator=generator)
        texts = ["".join(map(chr, row)) for row in torch.where(is_letter_BT, letters_BT, ord("#")).tolist()]
        labels_B = (is_letter_BT.float().mean(-1) > 0.5).long()
        loss = model(**tokenizer(texts, return_tensors="pt", padding=True), labels=labels_B).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval().save_pretrained(folder)
    return folder
