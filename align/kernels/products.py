"""The products that are most of what a base computes: with a frozen weight, and the sum of one with a small one."""

import os
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from align.kernels import few_rows
from align.kernels.cpu import is_made_by_amd

_WEIGHT_FIRST = 32  # rows, at most: MKL is twice as fast with the weight first; at 64 rows there is no difference

# oneDNN's own cache of kernels, and torch's before it. By default 1,024 each, of up to 1 MB: one for each shape of a
# product, and with rows of all lengths there is always a new shape.
_KERNEL_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
_KERNELS = 64  # a pass and its backward pass over a layer need some 30


def bound_kernel_caches() -> None:
    """Keep a CPU's bfloat16 products from holding up to a gigabyte of kernels. To be called before the first of them;
    what the user has set stands."""
    for name in _KERNEL_CACHES:
        os.environ.setdefault(name, str(_KERNELS))


# torch gives float32 products to MKL; on AMD's cores the oneDNN that torch brings too is up to 1.8 times as fast
_USES_ONEDNN = torch.backends.mkldnn.is_available() and is_made_by_amd()


def frozen_product(x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x Wᵀ + b: (N, O), contiguous. Which library computes it depends on the device, the dtype and the CPU's maker, and
    so do the last bits; on one machine the same shapes give the same bits."""
    if few_rows.fits(x_NI, weight_OI):
        return few_rows.product(x_NI, weight_OI, bias_O)[0]
    if x_NI.device.type == "cpu" and x_NI.dtype == torch.float32:
        if _USES_ONEDNN:
            return torch.ops.align.onednn_product(x_NI, weight_OI, bias_O)
        if len(x_NI) <= _WEIGHT_FIRST:
            y_NO = torch.mm(weight_OI, x_NI.t()).t().contiguous()
            return y_NO if bias_O is None else y_NO.add_(bias_O)
    return torch.mm(x_NI, weight_OI.t()) if bias_O is None else torch.addmm(bias_O, x_NI, weight_OI.t())


def frozen_linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x Wᵀ + b of x (..., I), differentiable by x alone."""
    return cast(Tensor, _FrozenLinear.apply(x, weight_OI, bias_O))


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight_OI)
        return frozen_product(x.reshape(-1, x.shape[-1]), weight_OI, bias_O).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable  # it has no types, so pyright misses the name of ctx
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (gradient,), (weight_OI,) = gradients, ctx.saved_tensors
        dx_NI = frozen_product(gradient.reshape(-1, gradient.shape[-1]), weight_OI.t())
        return dx_NI.view(*gradient.shape[:-1], -1), None, None


def add_product(sum_NO: Tensor, left_NR: Tensor, right_RO: Tensor, scale: float) -> Tensor:
    """sum += scale · left right, in place. A compiler makes a copy of the sum first, unless it is told as here."""
    if torch.compiler.is_compiling():
        torch.ops.align.add_product_(sum_NO, left_NR, right_RO, scale)
        return sum_NO
    return sum_NO.addmm_(left_NR, right_RO, alpha=scale)


def _onednn_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # inductor's; it takes constants alone


def _add_product_op(total: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    total.addmm_(left, right, alpha=scale)


# torch.library.custom_op says the same in one line, and costs 0.1 ms a call
_LIBRARY = torch.library.Library("align", "DEF")
_LIBRARY.define("onednn_product(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_LIBRARY.impl("onednn_product", _onednn_product, "CPU")
# shapes, for len(x) would make another graph for each number of rows
torch.library.register_fake("align::onednn_product", lambda x, w, _: x.new_empty(x.shape[0], w.shape[0]), lib=_LIBRARY)
_LIBRARY.define("add_product_(Tensor(a!) total, Tensor left, Tensor right, float scale) -> ()")
_LIBRARY.impl("add_product_", _add_product_op, "CompositeExplicitAutograd")
torch.library.register_fake("align::add_product_", lambda *_: None, lib=_LIBRARY)
