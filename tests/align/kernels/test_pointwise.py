from math import exp, sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from align.kernels import cpu, pointwise
from align.kernels.pointwise import use_own_pointwise
from tests.align.kernels.test_native import HAS_COMPILER
from tests.resident import distance, resident

DTYPES = (torch.float32, torch.bfloat16)
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 4e-3}
pytestmark = pytest.mark.skipif(not (cpu.has_avx512() and HAS_COMPILER), reason="no AVX-512, or no C++ compiler")


@pytest.fixture(scope="module", autouse=True)
def _prepared() -> None:
    pointwise.prepare()
    assert {dtype for _, dtype in pointwise._kernels} == set(DTYPES)  # pyright: ignore[reportPrivateUsage]


class Config:
    hidden_size, intermediate_size, mlp_bias, hidden_act = 24, 40, False, "silu"


def norm(width: int, dtype: torch.dtype, theirs: type = LlamaRMSNorm) -> nn.Module:
    made = theirs(width, 1e-5).requires_grad_(False)
    made.weight.copy_(torch.randn(width, generator=torch.Generator().manual_seed(0)))
    return made.to(dtype)


def mlp(dtype: torch.dtype, act: str = "silu") -> nn.Module:
    torch.manual_seed(0)
    made = LlamaMLP(Config()).requires_grad_(False)
    made.act_fn = ACT2FN[act]
    return made.to(dtype)


def is_ours(module: nn.Module) -> bool:
    return type(module).__module__ == "align.kernels.pointwise"


def learnt(module: nn.Module, x: Tensor, weight: Tensor) -> list[Tensor]:
    """What a module says of x, and the gradient of Σ weight · that by x."""
    x = x.detach().requires_grad_()
    y = module(x)
    return [y.detach(), *torch.autograd.grad((y * weight).sum(), x)]


# ---- the numbers ----


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_norm_by_hand(dtype: torch.dtype) -> None:
    """x = (3, 4) has the mean square 12.5; times w = (2, −1). With a gradient of (1, 0): g w = (2, 0), its mean product
    with n = x / rms is n₁, so dx = (2 − n₁², −n₁ n₂) / rms."""
    module = LlamaRMSNorm(2, 0.0).requires_grad_(False)
    module.weight.copy_(torch.tensor([2.0, -1.0]))
    use_own_pointwise(module.to(dtype))
    assert is_ours(module)
    y, dx = learnt(module, torch.tensor([[3.0, 4.0]], dtype=dtype), torch.tensor([[1.0, 0.0]], dtype=dtype))
    rms = sqrt(12.5)
    assert y.flatten().tolist() == pytest.approx([6 / rms, -4 / rms], rel=ROUNDING[dtype])
    assert dx.flatten().tolist() == pytest.approx([(2 - 9 / 12.5) / rms, -(12 / 12.5) / rms], rel=ROUNDING[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gate_by_hand(dtype: torch.dtype) -> None:
    """silu(1) · 3 = 3 σ(1); by up it has σ(1), by gate 3 σ(1) (1 + 1 − σ(1))."""
    gate, up = (torch.tensor([value], dtype=dtype, requires_grad=True) for value in (1.0, 3.0))
    y = pointwise._Gate.apply(gate, up)  # pyright: ignore[reportPrivateUsage]
    by_gate, by_up = torch.autograd.grad(y, (gate, up))
    share = 1 / (1 + exp(-1))
    found = [y.item(), by_gate.item(), by_up.item()]
    assert found == pytest.approx([3 * share, 3 * share * (2 - share), share], rel=ROUNDING[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 15, 16, 50, 576])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_norms_and_their_gradients_are_exact_but_for_rounding(rows: int, width: int, dtype: torch.dtype) -> None:
    module = norm(width, dtype)
    x, weight = torch.randn(2, 2, rows, width, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = learnt(norm(width, dtype).double(), x.double(), weight.double())
    use_own_pointwise(module)
    assert is_ours(module)
    for own, true in zip(learnt(module, x, weight), exact, strict=True):
        assert own.dtype == dtype
        assert (own.double() - true).norm() <= 2 * ROUNDING[dtype] * true.norm() + 1e-5 * (width == 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 16, 50, 5000])
def test_gates_and_their_gradients_are_exact_but_for_rounding(count: int, dtype: torch.dtype) -> None:
    gate, up, weight = torch.randn(3, count, generator=torch.Generator().manual_seed(1)).to(dtype)
    gate[: min(3, count)] = torch.tensor([-200.0, 1e15, -1e15])[:count]  # past what exponentials can say
    found: list[list[Tensor]] = []
    for own in (True, False):
        states = [(tensor if own else tensor.double()).requires_grad_() for tensor in (gate.detach(), up.detach())]
        y = pointwise._Gate.apply(*states) if own else nn.functional.silu(states[0]) * states[1]  # pyright: ignore[reportPrivateUsage]
        found.append([y.detach(), *torch.autograd.grad((y * weight).sum(), states)])
    for own, true in zip(*found, strict=True):
        assert own.dtype == dtype
        assert (own.double() - true).norm() <= ROUNDING[dtype] * true.norm() + 1e-30


def test_threads_change_no_bit_and_what_is_not_finite_stays_so() -> None:
    module, gated = norm(576, torch.float32), mlp(torch.float32)
    x, weight = torch.randn(2, 40, 576)
    y, other = torch.randn(2, 400, 24)
    use_own_pointwise(module)
    use_own_pointwise(gated)
    threads = torch.get_num_threads()
    found = [*learnt(module, x, weight), *learnt(gated, y, other)]
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert all(map(torch.equal, found, [*learnt(module, x, weight), *learnt(gated, y, other)]))
    finally:
        torch.set_num_threads(threads)
    x[0, 5] = float("nan")
    assert module(x)[0].isnan().all()
    assert module(x)[1:].isfinite().all()


# ---- whose forward it takes the place of ----


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_says_the_same_with_it(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    name = str(dtype).removeprefix("torch.")
    own = resident("llama", dtype=name).base.model
    assert sum(map(is_ours, own.modules())) == 2 * 2 + 1 + 2  # two norms and an MLP a layer, and the last norm
    with monkeypatch.context() as patch:
        patch.setattr(pointwise, "_kernels", {})
        patch.setattr(cpu, "has_avx512", lambda: False)
        theirs = resident("llama", dtype=name).base.model
    assert not any(map(is_ours, theirs.modules()))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        found, expected = (model(input_ids=ids).logits for model in (own, theirs))
    assert distance(found, expected) < {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]


class ClampedMLP(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=10)) * self.up_proj(x))


class ResidualRMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states: Tensor, residual: Tensor | None = None) -> Tensor:
        return super().forward(hidden_states if residual is None else hidden_states + residual)


UNLIKE = {
    "1 + w": norm(16, torch.float32, GemmaRMSNorm),
    "a norm of two arguments": norm(16, torch.float32, ResidualRMSNorm),
    "another activation": mlp(torch.bfloat16, "gelu"),
    "a clamped gate": ClampedMLP(Config()),
    "neither": nn.Linear(3, 3),
}


@pytest.mark.parametrize("module", UNLIKE.values(), ids=UNLIKE)
def test_what_says_something_else_is_left_alone(module: nn.Module) -> None:
    theirs = type(module)
    use_own_pointwise(module)
    assert type(module) is theirs


@pytest.mark.parametrize("theirs", [Qwen2RMSNorm, Qwen3RMSNorm, MistralRMSNorm])
def test_what_is_llamas_word_for_word_is_not(theirs: type) -> None:
    module = norm(16, torch.float32, theirs)
    use_own_pointwise(module)
    assert is_ours(module)
    assert isinstance(module, theirs)


def test_what_comes_in_another_dtype_and_what_is_compiled_goes_the_old_way(monkeypatch: pytest.MonkeyPatch) -> None:
    module, gated = norm(16, torch.float32), mlp(torch.float32)
    x, y = torch.randn(2, 16, dtype=torch.float64), torch.randn(2, 24)
    expected = module(x), gated(y)
    use_own_pointwise(module)
    use_own_pointwise(gated)
    assert is_ours(module)
    assert is_ours(gated)

    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(pointwise, "_run", refused)
    assert torch.equal(module(x), expected[0])
    compiled = torch.compile(lambda: (module(x.float()), gated(y)), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(), (expected[0].float(), expected[1]))
    module.requires_grad_()
    torch.testing.assert_close(module(x.float()), expected[0].float())


def test_without_a_compiler_nothing_is_changed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(pointwise, "_kernels", {})
    monkeypatch.setenv("CXX", f"{tmp_path}/none")
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path))
    pointwise.prepare()
    module = norm(16, torch.float32)
    use_own_pointwise(module)
    assert type(module) is LlamaRMSNorm
