"""Causal attention of whole short rows on a CPU, forwards and backwards, in row_attention.cpp.

torch's flash attention is made for long rows: of fifty to a hundred tokens it spends its time on what causality empties
and on the way to products, and it needs packed rows (`align.packing`) unpacked. This takes tokens from wherever they
stand, answers for what several rows begin with once, and sums in float32 whatever the dtype. Where
`align.kernels.native` cannot have it, torch's own attention does it.
"""

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from align.kernels import cpu, native
from align.packing import PackedRows

LONGEST = 1024  # tokens of a row, at most; from there on torch's is as fast in float32
_SOURCE = Path(__file__).with_suffix(".cpp")
_LANES = 16

_kernels: dict[tuple[torch.dtype, str], Callable[..., Any]] = {}
_dtypes: frozenset[torch.dtype] = frozenset()  # of the kernels, for a compiler to look at


def prepare() -> None:
    """Compile or find the kernels; to be called before weights are used. Where they cannot be had it says why, and all
    goes on without."""
    global _dtypes
    if _dtypes or not cpu.has_avx512():
        return
    library = native.library(_SOURCE, loss="learning takes longer than it could, with torch's attention")
    if library is None:
        return
    for way in ("forward_scratch", "backward_scratch"):
        getattr(library, way).restype = ctypes.c_int64
    for dtype in (torch.float32, torch.bfloat16):
        for way in ("forward", "backward"):
            _kernels[dtype, way] = native.function(library, way, dtype)
            _kernels[dtype, f"{way}_scratch"] = getattr(library, f"{way}_scratch")
    _dtypes = frozenset((torch.float32, torch.bfloat16))


def fits(query: Tensor, key: Tensor, value: Tensor, packing: PackedRows | None) -> bool:
    """Whether `attend` is there for these (B, heads, S, D), and faster than torch's."""
    length = key.shape[2] if packing is None else packing.shape[1]
    return (
        query.dtype in _dtypes
        and query.dtype == key.dtype == value.dtype
        and query.device.type == key.device.type == value.device.type == "cpu"
        and 1 < length <= LONGEST
        and key.shape == value.shape
        and (query.shape[0], query.shape[2], query.shape[3]) == (key.shape[0], key.shape[2], key.shape[3])
        and query.shape[1] % key.shape[1] == 0
        and query.shape[3] % _LANES == 0
        and query.stride(3) == key.stride(3) == value.stride(3) == 1
    )


def attend(query: Tensor, key: Tensor, value: Tensor, packing: PackedRows | None, scale: float) -> Tensor:
    """Each token's answer (B, S, heads, D) from itself and those before it in its row: query (B, heads, S, D), key and
    value (B, groups, S, D); of packed rows B is 1 and S the number of distinct tokens."""
    packed = (None,) * 4
    if packing is not None:
        packed = (packing.packed_BL, packing.lengths_B, packing.shared_B, packing.first_N)
    return cast(Tensor, _RowAttention.apply(query, key, value, scale, *packed))


class _RowAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, *packed: Tensor | None) -> Tensor:
        run = torch.ops.align.row_attention if torch.compiler.is_compiling() else _forward
        out, logs = run(query, key, value, scale, *packed)
        ctx.save_for_backward(query, key, value, out, logs, *packed)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable  # it has no types, so pyright misses the name of ctx
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        query, key, value, out, logs, *packed = ctx.saved_tensors
        run = torch.ops.align.row_attention_backward if torch.compiler.is_compiling() else _backward
        found = run(gradients[0], query, key, value, out, logs, ctx.scale, *packed)
        return *(gradient.transpose(1, 2) for gradient in found), None, None, None, None, None


def _forward(query: Tensor, key: Tensor, value: Tensor, scale: float, *packed: Tensor | None) -> tuple[Tensor, Tensor]:
    """The answers (B, S, heads, D), and the log of each softmax's sum (B, S, heads)."""
    batch, num_heads, length, size = query.shape
    out = query.new_empty(batch, length, num_heads, size)
    logs = query.new_empty(batch, length, num_heads, dtype=torch.float32)
    _run("forward", query, key, value, scale, packed, out, logs)
    return out, logs


def _backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logs: Tensor,
    scale: float,
    *packed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of query, key and value, each (B, S, heads, D)."""
    gradient = gradient.contiguous()
    found = tuple(states.new_empty(states.transpose(1, 2).shape) for states in (query, key, value))
    _run("backward", query, key, value, scale, packed, out, logs, gradient, *found)
    return cast(tuple[Tensor, Tensor, Tensor], found)


def _run(
    way: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    packed: tuple[Tensor | None, ...],
    *results: Tensor,
) -> None:
    states, (batch, num_heads, length, size) = (query, key, value), query.shape
    rows = (batch, length) if packed[0] is None else packed[0].shape
    threads = max(1, min(torch.get_num_threads(), rows[0] * key.shape[1]))  # each has scratch of its own
    strides = [(ctypes.c_int64 * 3)(*tensor.stride()[:3]) for tensor in states]
    sizes = (ctypes.c_int64 * 5)(*rows, num_heads, key.shape[1], size)
    # by torch, so that too little memory is torch's own error
    scratch = query.new_empty(_kernels[query.dtype, f"{way}_scratch"](sizes, threads), dtype=torch.float32)
    _kernels[query.dtype, way](
        *map(native.pointer, states),
        *strides,
        sizes,
        *map(native.pointer, packed),
        ctypes.c_float(scale),
        threads,
        native.pointer(scratch),
        *map(native.pointer, results),
    )


_PACKED = "Tensor? packed, Tensor? lengths, Tensor? shared, Tensor? first"
_LIBRARY = torch.library.Library("align", "FRAGMENT")
_LIBRARY.define(f"row_attention(Tensor q, Tensor k, Tensor v, float scale, {_PACKED}) -> (Tensor, Tensor)")
_LIBRARY.define(
    "row_attention_backward(Tensor gradient, Tensor q, Tensor k, Tensor v, Tensor out, Tensor logs, float scale, "
    f"{_PACKED}) -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.impl("row_attention", _forward, "CPU")
_LIBRARY.impl("row_attention_backward", _backward, "CPU")


def _fake(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, num_heads, length, size = query.shape
    shape = (batch, length, num_heads)
    return query.new_empty(*shape, size), query.new_empty(shape, dtype=torch.float32)


def _fake_backward(_: Tensor, query: Tensor, key: Tensor, value: Tensor, *__: Any) -> tuple[Tensor, ...]:
    return tuple(states.new_empty(states.transpose(1, 2).shape) for states in (query, key, value))


torch.library.register_fake("align::row_attention", _fake, lib=_LIBRARY)
torch.library.register_fake("align::row_attention_backward", _fake_backward, lib=_LIBRARY)
