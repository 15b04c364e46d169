"""y = x Wᵀ + b + s (x Aᵀ) Bᵀ of few rows x on a CPU: what decoding computes, and where libraries made for large
products read weights at a fraction of what memory gives.

One pass over the weight, in few_rows.cpp, with the low-rank part inside: each output is one sum over x and x Aᵀ, in
float32 whatever the dtype. Where AMX makes torch's bfloat16 product with the weight the faster one, the low-rank part
is added to that, in one step instead of four. Where `align.kernels.native` cannot have it, torch's own products do it.
"""

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from align.kernels import cpu, native

FEW = 64  # rows, at most; from there on libraries are as fast
_SOURCE = Path(__file__).with_suffix(".cpp")
_LANES = 16  # rows of x Aᵀ are kept with room for a multiple of these

_kernels: dict[torch.dtype, Callable[..., Any]] = {}
_dtypes: frozenset[torch.dtype] = frozenset()  # of the kernels, for a compiler to look at
_left: frozenset[torch.dtype] = frozenset()  # those in which the product with the weight is left to torch


def prepare() -> None:
    """Compile or find the kernels that are faster than torch's products on this CPU; to be called before weights are
    used. Where they cannot be had it says why, and all goes on without."""
    global _dtypes, _left
    if _dtypes or not (has := _supported()):
        return
    library = native.library(
        _SOURCE,
        *(("-mavx512bf16",) if torch.bfloat16 in has else ()),
        loss="answers are generated more slowly than they could be, with torch's products",
    )
    if library is not None:
        _kernels.update({dtype: native.function(library, "product", dtype) for dtype in has})
        _dtypes, _left = frozenset(has), _left_to_torch()


def fits(x_NI: Tensor, weight_OI: Tensor) -> bool:
    """Whether `product` is there for these, and faster than torch's. It has no gradient, so not if one is wanted."""
    return (
        x_NI.dtype in _dtypes
        and not (x_NI.dtype in _left and torch.compiler.is_compiling())  # whose loops for the low-rank part are as fast
        and 0 < x_NI.shape[0] <= FEW
        and x_NI.device.type == weight_OI.device.type == "cpu"
        and x_NI.dtype == weight_OI.dtype
        and x_NI.shape[1] == weight_OI.shape[1]
        and weight_OI.is_contiguous()
        and not (x_NI.requires_grad and torch.is_grad_enabled())
    )


def product(
    x_NI: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None = None,
    a_RI: Tensor | None = None,
    b_OR: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """y (N, O) in the dtype of x, W and b, and x Aᵀ (N, R) in float32 as A and B are; without them R is 0.

    What is said of a row depends neither on the rows beside it nor on the number of threads, but in what is left to
    torch.
    """
    if torch.compiler.is_compiling():
        return torch.ops.align.few_rows_product(x_NI, weight_OI, bias_O, a_RI, b_OR, scale)
    return _product(x_NI, weight_OI, bias_O, a_RI, b_OR, scale)


def _product(
    x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor | None, b_OR: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    x_NI = x_NI.contiguous()
    (num_rows, num_in), num_out = x_NI.shape, len(weight_OI)
    rank = 0 if a_RI is None else len(a_RI)
    stride = _stride(rank)
    low_NS = x_NI.new_zeros(num_rows, stride, dtype=torch.float32)
    is_left = x_NI.dtype in _left
    y_NO = linear(x_NI, weight_OI, bias_O) if is_left else x_NI.new_empty(num_rows, num_out)
    if is_left and not rank:
        return y_NO, low_NS
    held = (
        x_NI,
        None if is_left else weight_OI,
        *(None if own is None else own.contiguous() for own in (bias_O, a_RI, b_OR)),
    )
    x, weight, bias, a, b = map(native.pointer, held)
    y, low = native.pointer(y_NO), native.pointer(low_NS)
    sizes = (ctypes.c_int64(size) for size in (num_rows, num_in, num_out, rank, stride))
    _kernels[x_NI.dtype](x, weight, bias, a, b, ctypes.c_float(scale), y, low, *sizes, torch.get_num_threads())
    return y_NO, low_NS[:, :rank]


def _stride(rank: int) -> int:
    """Floats that a row of x Aᵀ is kept in."""
    return -(-rank // _LANES) * _LANES


def _supported() -> tuple[torch.dtype, ...]:
    """The dtypes in which this CPU can do it, and does it faster than torch."""
    if not cpu.has_avx512():
        return ()
    is_bfloat16_native = torch.cpu.get_capabilities().get("avx512_bf16")
    return (torch.float32, torch.bfloat16) if is_bfloat16_native else (torch.float32,)


def _left_to_torch() -> frozenset[torch.dtype]:
    return frozenset((torch.bfloat16,) if torch.cpu.get_capabilities().get("amx_bf16") else ())


_LIBRARY = torch.library.Library("align", "FRAGMENT")
_LIBRARY.define(
    "few_rows_product(Tensor x, Tensor weight, Tensor? bias, Tensor? a, Tensor? b, float scale) -> (Tensor, Tensor)"
)
_LIBRARY.impl("few_rows_product", _product, "CPU")


def _fake(x: Tensor, weight: Tensor, _: Any, a: Tensor | None, *__: Any) -> tuple[Tensor, Tensor]:
    num_rows = x.shape[0]  # len(x) would make another graph for each number
    rank = 0 if a is None else a.shape[0]
    stride = _stride(rank)
    return x.new_empty(num_rows, weight.shape[0]), x.new_empty(num_rows, stride, dtype=torch.float32)[:, :rank]


torch.library.register_fake("align::few_rows_product", _fake, lib=_LIBRARY)
