"""A tiny resident model with its adapters, for tests that need a real one."""

import torch

from align.adapters import AdaptedModel
from align.base import load_base
from align.config import AdaptersConfig, BaseModelConfig
from align.episodes import Episode

SHAPES = ("llama", "gpt2", "qwen2")


def resident(shape: str = "llama", *, dtype: str = "float32", **adapters: object) -> AdaptedModel:
    """A freshly loaded tiny model of one shape, without adapters yet; `adapters` are fields of AdaptersConfig."""
    base = load_base(BaseModelConfig.model_validate({"model": f"tiny:{shape}", "dtype": dtype, "device": "cpu"}))
    return AdaptedModel(base, AdaptersConfig.model_validate({"rank": 4, "alpha": 8.0, **adapters}))


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
