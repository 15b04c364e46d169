"""Our LoRA product against PEFT's own forward of the same layers."""

from typing import Any

import pytest
import torch
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor
from torch._inductor.utils import run_fw_bw_and_get_code

from align import lora
from align.adapters import AdaptedModel
from align.kernels import few_rows
from align.lora import LoRALinear
from tests.resident import SHAPES, with_adapters

IDS = torch.tensor([[5, 9, 200, 31, 7, 7, 80], [1, 2, 3, 4, 5, 6, 7]])


def outcome(model: AdaptedModel) -> tuple[Tensor, dict[str, Tensor]]:
    """Hidden states, and the gradient of some function of them by each tensor of the adapter."""
    parameters = model.tensors("policy")
    with model.role("policy", train=True):
        hidden_BSH = model.hidden(IDS)
        weights = torch.linspace(-1, 1, hidden_BSH.numel()).reshape(hidden_BSH.shape)
        gradients = torch.autograd.grad((weights * hidden_BSH.float()).sum(), list(parameters.values()))
    return hidden_BSH.detach(), dict(zip(parameters, gradients, strict=True))


def as_peft(model: AdaptedModel) -> None:
    for module in model.base.model.modules():
        if type(module) is LoRALinear:
            module.__class__ = PeftLinear  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("shape", SHAPES)
def test_hidden_states_and_gradients_are_those_of_pefts_own_forward(shape: str) -> None:
    model = with_adapters(shape, "sft", "policy")
    ours_BSH, ours = outcome(model)
    as_peft(model)
    theirs_BSH, theirs = outcome(model)
    torch.testing.assert_close(ours_BSH, theirs_BSH, rtol=1e-4, atol=1e-5)
    assert ours.keys() == theirs.keys()
    for key, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[key], rtol=1e-3, atol=1e-3)
        assert gradient.abs().max() > 0


def test_under_a_bfloat16_base_adapters_and_their_gradients_stay_float32() -> None:
    model = with_adapters("llama", "sft", "policy", dtype="bfloat16")
    hidden_BSH, gradients = outcome(model)
    assert hidden_BSH.dtype == torch.bfloat16
    assert {tensor.dtype for tensor in model.tensors("policy").values()} == {torch.float32}
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
    whole = with_adapters("llama", "sft", "policy")
    for key, exact in outcome(whole)[1].items():
        cosine = torch.nn.functional.cosine_similarity(gradients[key].flatten(), exact.flatten(), dim=0)
        assert cosine > 0.97


def test_the_same_bits_with_and_without_gradients() -> None:
    for dtype in ("float32", "bfloat16"):
        model = with_adapters("llama", "policy", dtype=dtype)
        with torch.no_grad(), model.role("policy"):
            without_BSH = model.hidden(IDS)
        assert torch.equal(outcome(model)[0], without_BSH)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("shape", "path"), [("llama", "layers.0.mlp.gate_proj"), ("gpt2", "h.0.mlp.c_fc")])
def test_compiled_without_gradients_few_rows_take_loops_and_many_take_products(
    shape: str, path: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where few rows have no product of their own. GPT-2 has the weight the other way round, and a bias."""
    monkeypatch.setattr(few_rows, "fits", lambda *_: False)
    looped: list[int] = []
    loops = lora._looped_product  # pyright: ignore[reportPrivateUsage]

    def counted(x_NI: Tensor, *args: Any) -> Tensor:
        looped.append(len(x_NI))
        return loops(x_NI, *args)

    monkeypatch.setattr(lora, "_looped_product", counted)
    model = with_adapters(shape, "policy", dtype=dtype)
    layer = model.trunk.get_submodule(path)
    compiled = torch.compile(layer, dynamic=True)
    with torch.no_grad(), model.role("policy"):
        for rows in (3, 24, 100):
            looped.clear()
            torch._dynamo.reset()  # pyright: ignore[reportPrivateUsage]
            x_N1I = torch.randn(rows, 1, 32, dtype=model.base.dtype)
            tolerance = 1e-5 if dtype == "float32" else 0.02  # bfloat16 rounds by a 256th, here twice
            torch.testing.assert_close(compiled(x_N1I), layer(x_N1I), rtol=tolerance, atol=2 * tolerance)
            assert bool(looped) == (rows < 100)


@pytest.mark.slow
def test_compiled_for_learning_the_low_rank_part_is_added_in_place_and_gives_the_same_gradients() -> None:
    """A compiler of its own accord copies each sum first: a twentieth of the time of learning."""
    model = with_adapters("llama", "policy")
    layer = model.trunk.get_submodule("layers.0.mlp.down_proj")
    compiled = torch.compile(layer, dynamic=True)
    x = torch.randn(few_rows.FEW + 1, 64, requires_grad=True)
    with model.role("policy", train=True):
        parameters = [x, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
        out, codes = run_fw_bw_and_get_code(lambda: compiled(x).square())
        plain = layer(x).square()
        expected = torch.autograd.grad(plain.sum(), parameters)
    torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-5)
    for parameter, true in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, true, rtol=1e-4, atol=1e-5)
    assert len(parameters) == 3
    assert len(codes) == 2
    for code in codes:
        assert code.count("align.add_product_.default(") == 1
        assert "extern_kernels.addmm(" not in code


def test_what_is_kept_for_the_backward_pass_is_the_input_once_and_its_low_rank_image() -> None:
    model = with_adapters("llama", "policy")
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    layer = model.trunk.get_submodule("layers.0.mlp")
    x = torch.randn(few_rows.FEW + 1, 32)
    with model.role("policy", train=True), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outs = [layer.get_submodule(name)(x) for name in ("gate_proj", "up_proj")]  # or the second may take its place
    assert len(outs) == 2
    rank = 4
    assert sum(kept.values()) == 4 * len(x) * (32 + 2 * rank)


def test_dropout_at_work_is_left_to_pefts_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_adapters("llama", "policy", dropout=0.5)
    layer = next(module for module in model.base.model.modules() if isinstance(module, LoRALinear))
    calls: list[int] = []
    plain = PeftLinear.forward
    monkeypatch.setattr(PeftLinear, "forward", lambda *args: calls.append(1) or plain(*args))
    x = torch.randn(3, 32)
    with model.role("policy"):
        layer(x)
        assert not calls
        layer.train()
        layer(x)
        assert calls == [1]
