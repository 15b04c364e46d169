"""Tiny random models with a byte-level tokenizer: `base.model: tiny:llama`, for tests and for a run in seconds.

Three shapes, since adapters, positions and templates differ: llama (ChatML template), gpt2 (Conv1D layers, learned
positions, no chat template, one special token), qwen2 (biases, ChatML, two EOS tokens).
"""

from functools import partial
from pathlib import Path
from typing import cast

from align.embedded import built_once, cache_folder
from align.errors import ModelError

SHAPES = ("llama", "gpt2", "qwen2")
_VERSION = "4"  # part of the cache's name: raise it when what is built changes
_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def find_tiny(shape: str) -> Path:
    """The cached folder of a tiny model; built on the first call, the same bytes on every machine of one torch."""
    verify_shape(shape)
    return built_once(cache_folder() / f"tiny-{shape}-{_VERSION}", partial(build_tiny, shape))


def verify_shape(shape: str) -> None:
    """ModelError if there is none of this name."""
    if shape not in SHAPES:
        raise ModelError(f"base.model: tiny:{shape} is not known; there are {', '.join('tiny:' + s for s in SHAPES)}")


def build_tiny(shape: str, folder: Path, *, seed: int = 0) -> None:
    """Write a two-layer model of width 32 with random weights of `seed`, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config
    from transformers.utils import logging

    tokenizer = _tokenizer(shape)
    if shape == "gpt2":
        config = GPT2Config(n_positions=512, n_embd=32, n_layer=2, n_head=4)
    else:
        config = LlamaConfig() if shape == "llama" else Qwen2Config(tie_word_embeddings=True)
        config.hidden_size, config.intermediate_size, config.max_position_embeddings = 32, 64, 512
        config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads = 2, 4, 2
        config.head_dim = 8
        config.layer_types = ["full_attention"] * 2
    config.vocab_size = len(tokenizer)
    config.eos_token_id, config.bos_token_id = cast(int, tokenizer.eos_token_id), None
    config.pad_token_id = cast("int | None", tokenizer.pad_token_id)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        # Or its logits would lie within ±1 of each other whatever an adapter does, and nothing could be learnt. Where
        # the embeddings are the same tensor, wider ones would drown what the layers add.
        model.get_output_embeddings().weight.data.mul_(10 if config.tie_word_embeddings else 20)
    if shape == "qwen2":  # as Qwen's instruct models: two tokens end an answer
        model.generation_config.eos_token_id = [
            tokenizer.eos_token_id,
            tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        ]
    has_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # a bar for 100 KB would be the first thing that a user sees
    model.save_pretrained(folder)
    if has_bars:
        logging.enable_progress_bar()
    tokenizer.save_pretrained(folder)


def _tokenizer(shape: str):
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    if shape == "gpt2":
        inner.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
        return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|endoftext|>")
    inner.add_special_tokens(
        [AddedToken(text, special=True) for text in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    )
    pad = "<|im_end|>" if shape == "llama" else "<|endoftext|>"  # llama: pad is EOS, as in many real tokenizers
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>", pad_token=pad, chat_template=_CHATML)
