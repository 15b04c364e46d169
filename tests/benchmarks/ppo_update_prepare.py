"""Makes what every process of ppo-update starts from: python -m tests.benchmarks.ppo_update_prepare JOB.

A random base with its tokenizer, prompts of exactly as many tokens as the task wants, and for ours the artifacts that
SFT and reward training would have left. The one EOS token has the id just past the vocabulary: no logit belongs to it,
so no response can end early, and neither system spends anything on withholding it. (It is also the pad token that the
peer is given, which would take a pad that was drawn for the end of the response.)
"""

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from align.adapters import AdaptedModel
from align.artifacts import write_directory
from align.base import load_base
from align.config import BaseModelConfig
from align.heads import ScalarHead, ScoreStatistics, save_head
from tests.benchmarks.ppo_update_ours import adapters_of
from tests.benchmarks.ppo_update_task import BASE, END, HEAD, PROMPTS, REWARD, SFT, Shape, Task

_PAD, _UNKNOWN = "<pad>", "<unk>"
_TEMPLATE = "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}"
# Two batches more than the updates draw: on the last batch of its data, TRL's optimizer steps after every micro-batch.
_SPARE_UPDATES = 2


def make_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """One word a token; `END` is the only one that the model does not have."""
    words = [_PAD, _UNKNOWN, *(f"w{i}" for i in range(2, vocabulary)), END]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=_UNKNOWN))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens([AddedToken(word, special=True) for word in (_PAD, _UNKNOWN, END)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=END, pad_token=_PAD, unk_token=_UNKNOWN, chat_template=_TEMPLATE
    )


def make_prompts(task: Task, vocabulary: int) -> list[str]:
    draw = random.Random(0)
    count = (task.updates + _SPARE_UPDATES) * task.episodes
    return [" ".join(f"w{draw.randrange(2, vocabulary)}" for _ in range(task.prompt_length)) for _ in range(count)]


def prepare(folder: Path, shape: Shape, task: Task) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.width, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=True, max_position_embeddings=8192, rms_norm_eps=1e-5, bos_token_id=None,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / BASE)
    make_tokenizer(shape.vocabulary).save_pretrained(folder / BASE)
    (folder / PROMPTS).write_text(json.dumps(make_prompts(task, shape.vocabulary)), encoding="utf-8")
    base = load_base(BaseModelConfig(model=str(folder / BASE), device="cpu"))
    _write_artifacts(folder, AdaptedModel(base, adapters_of(task)))


def _write_artifacts(folder: Path, model: AdaptedModel) -> None:
    def write(kind: str, name: str, fill: Callable[[Path], None]) -> None:
        write_directory(folder / name, fill, kind=kind, stage=name, step=1, base_identity=model.base_identity)

    for seed, name in enumerate((SFT, REWARD)):
        model.add(name, seed=seed)
        for tensor in model.tensors(name).values():
            tensor.data.normal_(std=0.02)
        write("adapter", name, lambda path, name=name: model.save(name, path))
    head = ScalarHead(model.hidden_size).initialize(0)
    write("head", HEAD, lambda path: save_head(head, path, ScoreStatistics(0.0, 1.0, 1)))


def main(path: Path) -> None:
    job = json.loads(path.read_text(encoding="utf-8"))
    prepare(Path(job["folder"]), Shape(**job["shape"]), Task(**job["task"]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
