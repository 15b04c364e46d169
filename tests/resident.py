"""A tiny resident model with its adapters, for tests that need a real one."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from align.adapters import AdaptedModel
from align.base import load_base
from align.config import AdaptersConfig, BaseModelConfig
from align.episodes import Episode

SHAPES = ("llama", "gpt2", "qwen2")


def resident(shape: str | Path = "llama", *, dtype: str = "float32", **adapters: object) -> AdaptedModel:
    """A freshly loaded tiny model of one shape, or of a folder, without adapters yet; `adapters` are fields of
    AdaptersConfig."""
    model = str(shape) if isinstance(shape, Path) else f"tiny:{shape}"
    base = load_base(BaseModelConfig.model_validate({"model": model, "dtype": dtype, "device": "cpu"}))
    return AdaptedModel(base, AdaptersConfig.model_validate({"rank": 4, "alpha": 8.0, **adapters}))


def save_wide_llama(folder: Path) -> Path:
    """A Llama of random weights whose heads are as wide as the kernel of attention asks for, and its tokenizer."""
    tokenizer = resident("llama").base.tokenizer
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    config.eos_token_id = config.pad_token_id = len(tokenizer) - 1
    config.num_attention_heads = config.num_key_value_heads = 4
    config.head_dim = 16
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def randomize(model: AdaptedModel, name: str, *, seed: int = 0, scale: float = 0.3) -> None:
    """Give an adapter weights that change what the model says; a new one has B = 0."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.tensors(name).values():
        tensor.data.copy_(scale * torch.randn(tensor.shape, generator=generator))


def with_adapters(shape: str, *names: str, dtype: str = "float32", **adapters: object) -> AdaptedModel:
    """As `resident`, with adapters of these names, each with random weights of its own."""
    model = resident(shape, dtype=dtype, **adapters)
    for seed, name in enumerate(names):
        model.add(name, seed=seed)
        randomize(model, name, seed=seed)
    return model


def count_tokens(model: AdaptedModel) -> list[int]:
    """Tokens of each pass through the embeddings from now on."""
    counts: list[int] = []
    embeddings = model.base.model.get_input_embeddings()
    embeddings.register_forward_hook(lambda _, inputs, __: counts.append(inputs[0].numel()))
    return counts


def distance(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative to the norm of the exact one."""
    return ((found.float() - exact.float()).norm() / exact.float().norm()).item()


def logits_of(model: AdaptedModel, ids: tuple[int, ...] | list[int]) -> torch.Tensor:
    """float32 (S, V) by the model's own forward, under the present role."""
    with torch.no_grad():
        return model.base.model(input_ids=torch.tensor([list(ids)])).logits[0].float()


def drawn_episodes(lengths: list[tuple[int, int]], *, end: int, seed: int = 0) -> list[Episode]:
    """Episodes of random byte ids with these (prompt, response) lengths; each response ends with `end`."""
    generator = torch.Generator().manual_seed(seed)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, 250, (count,), generator=generator).tolist())

    return [Episode(ids(prompt), (*ids(response - 1), end), has_eos=True) for prompt, response in lengths]
