"""RMS norms and SiLU-gated MLPs of a CPU, forwards and backwards, each in one walk over memory (pointwise.cpp).

transformers says them as some six operators of torch each, which keep what lies between for the backward pass, and take
a fifth of a plain layer's time. Here they keep their inputs alone, and are rounded once. A compiler fuses the operators
itself, with what stands around them, so to it they are left.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from align import native

_SOURCE = Path(__file__).with_suffix(".cpp")
_DTYPES = (torch.float32, torch.bfloat16)
_WAYS = ("norm_forward", "norm_backward", "gate_forward", "gate_backward")
_kernels: dict[tuple[str, torch.dtype], Callable[..., Any]] = {}


def prepare() -> None:
    """Compile or find the kernels. Where they cannot be had it says why, and all goes on without."""
    if _kernels or not native.has_avx512():
        return
    library = native.library(_SOURCE, loss="learning takes longer than it could, with torch's norms and activations")
    if library is not None:
        for dtype in _DTYPES:
            for way in _WAYS:
                _kernels[way, dtype] = getattr(library, f"{way}_{str(dtype).removeprefix('torch.')}")


@torch.no_grad()
def use_own_pointwise(model: nn.Module) -> None:
    """Give norms and MLPs of a frozen model on a CPU the forwards below: those of the classes whose own forward says
    what ours does, as tried on the first of each."""
    says_the_same: dict[type, bool] = {}
    for module in list(model.modules()):
        own, width = _form(module)
        if own is None:
            continue
        theirs = type(module)
        if theirs not in says_the_same:
            x = torch.randn(2, width, generator=torch.Generator().manual_seed(0)).to(next(module.parameters()).dtype)
            expected = module(x).float()
            module.__class__ = own
            tolerance = torch.finfo(x.dtype).eps ** 0.5  # relative; a weight of 1 + w is nowhere near
            difference = (module(x).float() - expected).norm()
            says_the_same[theirs] = bool(difference <= tolerance * expected.norm())
        module.__class__ = own if says_the_same[theirs] else theirs


def _form(module: nn.Module) -> tuple[type | None, int]:
    """The class with our forward for a module, and how wide its input is; None if it looks like neither."""
    theirs = type(module)
    weight = getattr(module, "weight", None)
    if not _kernels or next(module.parameters(), torch.empty(0)).dtype not in _DTYPES:
        return None, 0
    if theirs.__name__.endswith("RMSNorm") and isinstance(weight, Tensor) and hasattr(module, "variance_epsilon"):
        return _subclass(_Norm, theirs), len(weight)
    linears = (getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj"))
    if all(isinstance(linear, nn.Linear) for linear in linears) and hasattr(module, "act_fn"):
        return _subclass(_GatedMLP, theirs), cast(nn.Linear, module.gate_proj).in_features
    return None, 0


@cache
def _subclass(mixin: type, theirs: type) -> type:
    return type(theirs.__name__, (mixin, theirs), {})


def _fits(x: Tensor) -> bool:
    return not torch.compiler.is_compiling() and x.dtype in _DTYPES and x.device.type == "cpu"


class _Norm(nn.Module):
    def forward(self, hidden_states: Tensor) -> Tensor:
        if not _fits(hidden_states) or hidden_states.dtype != self.weight.dtype:
            return super().forward(hidden_states)
        return cast(Tensor, _NormProduct.apply(hidden_states, self.weight, self.variance_epsilon))


class _GatedMLP(nn.Module):
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        if not _fits(x):
            return super().forward(x)
        return self.down_proj(_Gate.apply(self.gate_proj(x), self.up_proj(x)))


class _NormProduct(torch.autograd.Function):
    """w x / √(mean x² + ε) over the last dimension (Zhang and Sennrich 2019), by a frozen w."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        x = x.contiguous()
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
    given = (ctypes.c_void_p(one.data_ptr()) if isinstance(one, Tensor) else one for one in (first, *others))
    _kernels[way, first.dtype](*given, *map(ctypes.c_int64, sizes), torch.get_num_threads())
