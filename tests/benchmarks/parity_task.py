"""The task of learning-parity: a little language of our own, a model that speaks it, and a scripted reward.

A prompt names one or two nouns; an answer says something about the first, in one or two clauses. The reward wants
bright adjectives. The model is pretrained here, in about a minute, and kept in the cache as an ordinary folder.
"""

import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from align.embedded import cache_folder

_VERSION = "1"  # part of the cache's name: raise it when what is built changes
# fmt: off
NOUNS = (
    "lamp", "river", "stone", "garden", "tower", "bird", "horse", "letter", "window", "bridge", "song", "field",
    "engine", "boat", "mirror", "forest", "road", "clock", "table", "river-bed", "harbour", "baker", "sailor",
    "teacher", "farmer", "painter", "doctor", "child", "queen", "soldier", "market", "village",
)
VERBS = (
    "sees", "finds", "holds", "follows", "leaves", "meets", "keeps", "watches", "carries", "calls", "builds",
    "paints", "likes", "hears", "turns", "moves",
)
BRIGHT = (
    "golden", "happy", "kind", "shining", "gentle", "brave", "lovely", "merry", "warm", "bright", "cheerful",
    "graceful", "noble", "radiant", "sweet", "tender",
)
DULL = (
    "grey", "old", "heavy", "broken", "quiet", "narrow", "cold", "plain", "rusty", "slow", "dusty", "hollow",
    "bitter", "pale", "rough", "empty", "distant", "damp", "bare", "crooked",
)
ADVERBS = ("slowly", "often", "never", "again", "here", "today", "alone", "twice")
PREPOSITIONS = ("near", "under", "over", "behind")
DETERMINERS = ("the", "a", "every", "some")
CONJUNCTIONS = ("and", "but", "while")
# fmt: on
SPECIAL = ("<pad>", "<unk>", "<user>", "<assistant>", "<end>")
_TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '> ' + message['content'] }}"
    "{{ ' <end> ' if message['role'] == 'assistant' else ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)
HELD_OUT = 256
WANTED = 6


def reward(prompt: str, response: str) -> float:
    """In [0, 1]: how many different bright words there are, of WANTED. To say one over and over does not pay."""
    return min(1.0, len(set(response.split()) & set(BRIGHT)) / WANTED)


def prompts() -> tuple[list[str], list[str]]:
    """Those to train on, and HELD_OUT others."""
    texts = [f"about {first}" for first in NOUNS]
    texts += [f"about {first} and {second}" for first in NOUNS for second in NOUNS if first != second]
    random.Random(0).shuffle(texts)
    return texts[HELD_OUT:], texts[:HELD_OUT]


def _noun_phrase(draw: random.Random, noun: str) -> list[str]:
    adjectives = [draw.choice(BRIGHT if draw.random() < 0.5 else DULL) for p in (0.8, 0.4) if draw.random() < p]
    return [draw.choice(DETERMINERS), *adjectives, noun]


def _clause(draw: random.Random, subject: str) -> list[str]:
    words = [*_noun_phrase(draw, subject), draw.choice(VERBS)]
    if draw.random() < 0.6:
        words += [draw.choice(PREPOSITIONS), *_noun_phrase(draw, draw.choice(NOUNS))]
    return words + ([draw.choice(ADVERBS)] if draw.random() < 0.3 else [])


def answer(draw: random.Random, prompt: str) -> str:
    """As the language has it: about the prompt's first noun, then perhaps about its last."""
    nouns = prompt.removeprefix("about ").split(" and ")
    words = _clause(draw, nouns[0])
    if draw.random() < 0.6:
        words += [draw.choice(CONJUNCTIONS), *_clause(draw, nouns[-1])]
    return " ".join(words)


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = [*SPECIAL, "about", *NOUNS, *VERBS, *BRIGHT, *DULL, *ADVERBS, *PREPOSITIONS, *DETERMINERS, *CONJUNCTIONS]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(dict.fromkeys(words))}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<end>", pad_token="<pad>", unk_token="<unk>", chat_template=_TEMPLATE
    )


def row_scorer(tokenizer: PreTrainedTokenizerFast) -> Callable[[list[int]], float]:
    """The reward of a row of ids: prompt and response, which <assistant> stands between."""
    border = int(tokenizer.convert_tokens_to_ids("<assistant>"))  # type: ignore[arg-type]

    def score(ids: list[int]) -> float:
        start = ids.index(border) + 1
        texts = [str(tokenizer.decode(part, skip_special_tokens=True)) for part in (ids[:start], ids[start:])]
        return reward(texts[0], texts[1])

    return score


# ---- pretraining ----


@dataclass(frozen=True)
class _Pretraining:
    steps: int = 1500
    batch: int = 64
    learning_rate: float = 3e-3


def find_model() -> Path:
    """The folder of the pretrained model, made on the first call."""
    folder = cache_folder() / f"learning-parity-{_VERSION}"
    if (folder / "config.json").is_file():
        return folder
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        _pretrain(temporary, _Pretraining())
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=128, eos_token_id=4, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def _pretrain(folder: Path, how: _Pretraining) -> None:
    """Plain cross-entropy on the language, prompts included, with a learning rate that falls to 0."""
    tokenizer, draw = make_tokenizer(), random.Random(1)
    asked, _ = prompts()  # the held-out prompts are new to the pretrained model, too
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _new_model(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=how.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 2 * (1 - step / how.steps)))
    for _ in range(how.steps):
        drawn = [draw.choice(asked) for _ in range(how.batch)]
        texts = [f"<user> {prompt} <assistant> {answer(draw, prompt)} <end>" for prompt in drawn]
        ids_BS = tokenizer(texts, padding=True, return_tensors="pt", padding_side="right")["input_ids"]
        assert isinstance(ids_BS, torch.Tensor)
        logits_BSV = model(input_ids=ids_BS).logits
        loss = cross_entropy(logits_BSV[:, :-1].flatten(0, 1), ids_BS[:, 1:].flatten(), ignore_index=0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
