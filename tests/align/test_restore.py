import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from align.adapters import AdaptedModel
from align.restore import lent, snapshot
from tests.resident import SHAPES, logits_of, with_adapters

IDS = [3, 200, 17, 17, 4]


def rude_trainer(model: PreTrainedModel) -> None:
    """All that trainers are known to do to the model they are given, and then some."""
    model.train()
    model.config.use_cache = False
    model.config.rude = "yes"
    model.generation_config.max_length = 7
    model.generation_config.eos_token_id = None
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    for path, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if path.endswith("mlp"):
            plain = module.forward
            module.__dict__["forward"] = lambda *args, plain=plain, **kwargs: plain(*args, **kwargs) * 2
            module.__dict__["_original_forward"] = plain
            module.register_forward_hook(lambda _, __, out: out + 1)
            module.register_forward_pre_hook(lambda *_: None)
            module.register_full_backward_hook(lambda *_: None)
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 2 == 0)
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)


def said(model: AdaptedModel) -> Tensor:
    with model.role("sft"):
        return logits_of(model, IDS)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("train", [False, True])
def test_a_rude_trainer_leaves_no_trace(shape: str, train: bool) -> None:
    model = with_adapters(shape, "sft", "policy", dropout=0.1)
    for checkpointing in (False, True):
        if checkpointing:
            model.base.model.gradient_checkpointing_enable()
        before, told = snapshot(model.base.model), said(model)
        with lent(model.base.model), model.role("policy", train=train):
            rude_trainer(model.base.model)
            assert snapshot(model.base.model) != before
            assert not torch.equal(logits_of(model, IDS), told)
        assert snapshot(model.base.model) == before
        assert model.base.model.is_gradient_checkpointing == checkpointing
        assert all(parameter.grad is None for parameter in model.base.model.parameters())
        assert torch.equal(said(model), told)
        model.verify_trainable()


def test_the_model_comes_back_also_from_a_trainer_that_fails() -> None:
    model = with_adapters("llama", "sft")
    before = snapshot(model.base.model)

    def train() -> None:
        with lent(model.base.model):
            rude_trainer(model.base.model)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train()
    assert snapshot(model.base.model) == before


def test_trained_weights_stay() -> None:
    model = with_adapters("llama", "sft")
    before = model.checksum("sft")
    with lent(model.base.model):
        next(iter(model.tensors("sft").values())).data.add_(1)
    assert model.checksum("sft") != before


def test_the_global_random_states_are_put_back() -> None:
    model = with_adapters("llama", "sft")

    def draws() -> tuple[float, float, float]:
        return torch.rand(()).item(), random.random(), float(np.random.rand())

    def seed() -> None:
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)

    seed()
    expected = draws()
    seed()
    with lent(model.base.model):
        torch.manual_seed(99)
        random.seed(99)
        np.random.seed(99)
        draws()
    assert draws() == expected


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.train(),
        lambda model: setattr(model.config, "use_cache", not model.config.use_cache),
        lambda model: model.gradient_checkpointing_enable(),
        lambda model: model.enable_input_require_grads(),
        lambda model: setattr(model, "forward", model.forward),
        lambda model: next(model.parameters()).requires_grad_(True),
        lambda model: model.lm_head.register_forward_hook(lambda *_: None),
        lambda model: model.lm_head.register_full_backward_hook(lambda *_: None),
    ],
    ids=["mode", "use_cache", "checkpointing", "input grads", "forward", "requires_grad", "hook", "backward hook"],
)
def test_a_snapshot_sees_each_single_change(change: Callable[[PreTrainedModel], object]) -> None:
    model = with_adapters("llama", "sft").base.model
    before = snapshot(model)
    assert snapshot(model) == before
    change(model)
    assert snapshot(model) != before
