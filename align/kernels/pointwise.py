"""RMS norms and SiLU-gated MLPs of a CPU, forwards and backwards, each in one walk over memory (pointwise.cpp).

transformers says them as some six operators of torch each, which keep what lies between for the backward pass, and take
a fifth of a plain layer's time. Here they keep their inputs alone, and are rounded once. A compiler fuses the operators
itself, with what stands around them, so to it they are left.
"""

import ast
import ctypes
import inspect
from collections.abc import Callable
from functools import cache
from pathlib import Path
from textwrap import dedent
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from align.kernels import cpu, native

_SOURCE = Path(__file__).with_suffix(".cpp")
_DTYPES = (torch.float32, torch.bfloat16)
_WAYS = ("norm_forward", "norm_backward", "gate_forward", "gate_backward")
_kernels: dict[tuple[str, torch.dtype], Callable[..., Any]] = {}


def prepare() -> None:
    """Compile or find the kernels. Where they cannot be had it says why, and all goes on without."""
    if _kernels or not cpu.has_avx512():
        return
    library = native.library(_SOURCE, loss="learning takes longer than it could, with torch's norms and activations")
    if library is not None:
        for dtype in _DTYPES:
            for way in _WAYS:
                _kernels[way, dtype] = native.function(library, way, dtype)


def use_own_pointwise(model: nn.Module) -> None:
    """Give norms and MLPs of a frozen model on a CPU the forwards below, if the kernels are there."""
    for module in list(model.modules()) if _kernels else ():
        mixin = form(module)
        if mixin is not None:
            module.__class__ = _subclass(mixin, type(module))


def form(module: nn.Module) -> type[nn.Module] | None:
    """Whose forward would say what the module's own does: that of those whose text is Llama's, word for word."""
    theirs = type(module)
    if theirs.__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
        return Norm if _text(theirs) == _text(LlamaRMSNorm) else None
    if theirs.__name__.endswith("MLP") and type(getattr(module, "act_fn", None)) in (SiLUActivation, nn.SiLU):
        return GatedMLP if _text(theirs) == _text(LlamaMLP) else None
    return None


@cache
def _text(module: type[nn.Module]) -> tuple[str, ...]:
    """Of its forward, without types and layout; if there is none to be had, one like no other."""
    try:
        (function,) = ast.parse(dedent(inspect.getsource(module.forward))).body
        assert isinstance(function, ast.FunctionDef)
    except (OSError, SyntaxError, TypeError, ValueError, AssertionError):
        return (repr(module), "has no text")
    for node in ast.walk(function.args):
        if isinstance(node, ast.arg):
            node.annotation = None
    return ast.dump(function.args), *map(ast.dump, function.body)


@cache
def _subclass(mixin: type, theirs: type) -> type:
    """Theirs with another forward."""
    return type(theirs.__name__, (mixin, theirs), {})


def _fits(*tensors: Tensor) -> bool:
    first = tensors[0]
    return (
        not torch.compiler.is_compiling()
        and first.dtype in _DTYPES
        and first.device.type == "cpu"
        and all(own.dtype == first.dtype and own.shape[-1] == first.shape[-1] for own in tensors)
    )


class Norm(nn.Module):
    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not _fits(hidden_states, self.weight) or self.weight.requires_grad:
            return super().forward(hidden_states)
        return cast(Tensor, _NormProduct.apply(hidden_states, self.weight, self.variance_epsilon))


class GatedMLP(nn.Module):
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(_Gate.apply(gate, up) if _fits(gate, up) else self.act_fn(gate) * up)


class _NormProduct(torch.autograd.Function):
    """w x / √(mean x² + ε) over the last dimension (Zhang and Sennrich 2019), by a frozen w."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        y, inverse = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
        _run("norm_forward", x, weight, ctypes.c_float(epsilon), y, inverse, sizes=(inverse.numel(), x.shape[-1]))
        ctx.save_for_backward(x, weight, inverse)
        return y

    @staticmethod
    @once_differentiable  # it has no types, so pyright misses the name of ctx
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, inverse = ctx.saved_tensors
        dx = torch.empty_like(x)
        _run("norm_backward", gradients[0].contiguous(), x, weight, inverse, dx, sizes=(inverse.numel(), x.shape[-1]))
        return dx, None, None


class _Gate(torch.autograd.Function):
    """silu(gate) · up (SwiGLU: Shazeer 2020)."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        y = torch.empty_like(gate)
        _run("gate_forward", gate, up, y, sizes=(gate.numel(),))
        ctx.save_for_backward(gate, up)
        return y

    @staticmethod
    @once_differentiable  # it has no types, so pyright misses the name of ctx
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gate, up = ctx.saved_tensors
        found = torch.empty_like(gate), torch.empty_like(up)
        _run("gate_backward", gradients[0].contiguous(), gate, up, *found, sizes=(gate.numel(),))
        return found


def _run(way: str, first: Tensor, *others: Any, sizes: tuple[int, ...]) -> None:
    given = (native.pointer(one) if isinstance(one, Tensor) else one for one in (first, *others))
    _kernels[way, first.dtype](*given, *map(ctypes.c_int64, sizes), torch.get_num_threads())
