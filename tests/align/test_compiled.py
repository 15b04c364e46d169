import dataclasses

import pytest
import torch
from torch import Tensor

from align.adapters import AdaptedModel
from align.config import AdaptersConfig
from align.heads import ScalarHead
from tests.resident import randomize, resident

pytestmark = pytest.mark.slow  # a C++ compiler is at work


def both(dtype: str) -> tuple[AdaptedModel, AdaptedModel]:
    """The same weights, plain and compiled."""
    models: list[AdaptedModel] = []
    for is_compiled in (False, True):
        base = dataclasses.replace(resident("llama", dtype=dtype).base, is_compiled=is_compiled)
        model = AdaptedModel(base, AdaptersConfig(rank=4))
        model.add("policy")
        randomize(model, "policy", scale=0.1)
        models.append(model)
    return models[0], models[1]


def learnt(model: AdaptedModel, ids_BS: Tensor) -> tuple[Tensor, list[Tensor]]:
    head = ScalarHead(model.hidden_size).initialize(1)
    with model.role("policy", train=True):
        hidden_BSH = model.hidden(ids_BS)
        gradients = torch.autograd.grad(head(hidden_BSH).square().sum(), list(model.tensors("policy").values()))
    return hidden_BSH.detach(), list(gradients)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiled_layers_say_the_same_with_and_without_gradients_and_what_plain_ones_say(dtype: str) -> None:
    plain, compiled = both(dtype)
    for shape in ((3, 9), (2, 14)):
        ids_BS = torch.randint(0, 250, shape, generator=torch.Generator().manual_seed(0))
        hidden_BSH, gradients = learnt(compiled, ids_BS)
        with torch.no_grad(), compiled.role("policy"):
            looked_BSH = compiled.hidden(ids_BS)
        assert torch.equal(looked_BSH, hidden_BSH)  # to the bit: or the first ratio would not be 1
        assert not looked_BSH.requires_grad
        expected_BSH, expected = learnt(plain, ids_BS)
        tolerance = 1e-4 if dtype == "float32" else 0.1
        torch.testing.assert_close(hidden_BSH, expected_BSH, rtol=tolerance, atol=tolerance)
        for ours, theirs in zip(gradients, expected, strict=True):
            assert torch.nn.functional.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.98
    # outside of these passes the layers are plain, and nothing stays switched
    layers = [layer for layer in compiled.base.model.modules() if hasattr(layer, "self_attn")]
    assert len(layers) == 2
    assert all(layer._compiled_call_impl is None for layer in layers)  # pyright: ignore[reportPrivateUsage]
    compiled.verify_trainable()
