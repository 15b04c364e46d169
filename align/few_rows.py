"""y = x Wᵀ + b + s (x Aᵀ) Bᵀ of few rows x on a CPU: what decoding computes, and where libraries made for large
products read weights at a fraction of what memory gives.

One pass over the weight, in few_rows.cpp, with the low-rank part inside: each output is one sum over x and x Aᵀ, in
float32 whatever the dtype. It is compiled once, when a base is loaded, and kept in the cache folder. Without a C++
compiler, or AVX-512, torch's own products do it.
"""

import ctypes
import logging
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align.artifacts import sha256_of_json
from align.embedded import cache_folder

FEW = 64  # rows, at most; from there on libraries are as fast
_SOURCE = Path(__file__).with_suffix(".cpp")
_COMPILERS = ("c++", "g++", "clang++")
_FLAGS = ("-O3", "-std=c++17", "-fopenmp", "-fPIC", "-shared")
_AVX512 = ("avx512_f", "avx512_bw", "avx512_dq", "avx512_vl", "fma3")
_LANES = 16  # rows of x Aᵀ are kept with room for a multiple of these

_kernels: dict[torch.dtype, Callable[..., Any]] = {}
_dtypes: frozenset[torch.dtype] = frozenset()  # of the kernels, for a compiler to look at


def prepare() -> None:
    """Compile or find the kernels that are faster than torch's products on this CPU. To be called before weights are
    used; after the first time it does nothing. Where they cannot be had it says why, once, and all goes on without."""
    global _dtypes
    if _dtypes or not (has := _supported()):
        return
    try:
        library = ctypes.CDLL(str(_built(is_bfloat16_native=torch.bfloat16 in has)))
    except (OSError, subprocess.SubprocessError) as error:
        said = error.stderr if isinstance(error, subprocess.CalledProcessError) and error.stderr else str(error)
        logging.getLogger(__name__).warning(
            "answers are generated more slowly than they could be, with torch's products: few_rows.cpp could not be "
            "compiled or loaded: %s",
            said.strip().splitlines()[0],
        )
        return
    _kernels.update({dtype: getattr(library, f"product_{str(dtype).removeprefix('torch.')}") for dtype in has})
    _dtypes = frozenset(has)


def fits(x_NI: Tensor, weight_OI: Tensor) -> bool:
    """Whether `product` is there for these, and faster than torch's."""
    return x_NI.dtype in _dtypes and x_NI.device.type == "cpu" and 0 < len(x_NI) <= FEW and weight_OI.is_contiguous()


def product(
    x_NI: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None = None,
    a_RI: Tensor | None = None,
    b_OR: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """y (N, O) in the dtype of x, W and b, and x Aᵀ (N, R) in float32 as A and B are; without them R is 0.

    What is said of a row depends neither on the rows beside it nor on the number of threads.
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
    stride = -(-rank // _LANES) * _LANES
    y_NO = x_NI.new_empty(num_rows, num_out)
    low_NS = x_NI.new_zeros(num_rows, stride, dtype=torch.float32)
    held = (x_NI, weight_OI, bias_O, *(None if own is None else own.contiguous() for own in (a_RI, b_OR)))
    x, weight, bias, a, b = (None if tensor is None else ctypes.c_void_p(tensor.data_ptr()) for tensor in held)
    y, low = ctypes.c_void_p(y_NO.data_ptr()), ctypes.c_void_p(low_NS.data_ptr())
    sizes = (ctypes.c_int64(size) for size in (num_rows, num_in, num_out, rank, stride))
    _kernels[x_NI.dtype](x, weight, bias, a, b, ctypes.c_float(scale), y, low, *sizes, torch.get_num_threads())
    return y_NO, low_NS[:, :rank]


def _supported() -> tuple[torch.dtype, ...]:
    """The dtypes in which this CPU can do it, and does it faster than torch."""
    capabilities = torch.cpu.get_capabilities()
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not all(capabilities.get(name) for name in _AVX512):
        return ()
    is_bfloat16_native = capabilities.get("avx512_bf16") and not capabilities.get("amx_bf16")  # AMX is torch's to use
    return (torch.float32, torch.bfloat16) if is_bfloat16_native else (torch.float32,)


def _built(*, is_bfloat16_native: bool) -> Path:
    """The compiled library, from the cache folder or put there. Raises OSError or SubprocessError."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, _COMPILERS), None)
    if compiler is None:
        raise OSError(f"there is no C++ compiler ({', '.join(_COMPILERS)}; or name one in CXX)")
    instructions = [f"-m{name.replace('_', '').replace('fma3', 'fma')}" for name in _AVX512]
    flags = [*_FLAGS, *instructions, *(["-mavx512bf16"] if is_bfloat16_native else [])]
    key = sha256_of_json([_SOURCE.read_text(encoding="utf-8"), compiler, *flags])
    path = cache_folder() / f"few_rows-{key[:16]}.so"
    if not path.is_file():
        logging.getLogger(__name__).info("compiling the products of few rows once (some 3 s)")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            command = [*compiler.split(), *flags, str(_SOURCE), "-o", str(temporary)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
            temporary.replace(path)  # whole or not there
        finally:
            temporary.unlink(missing_ok=True)
    return path


_LIBRARY = torch.library.Library("align", "FRAGMENT")
_LIBRARY.define(
    "few_rows_product(Tensor x, Tensor weight, Tensor? bias, Tensor? a, Tensor? b, float scale) -> (Tensor, Tensor)"
)
_LIBRARY.impl("few_rows_product", _product, "CPU")


def _fake(x: Tensor, weight: Tensor, _: Any, a: Tensor | None, *__: Any) -> tuple[Tensor, Tensor]:
    rank = 0 if a is None else len(a)
    stride = -(-rank // _LANES) * _LANES
    return x.new_empty(len(x), len(weight)), x.new_empty(len(x), stride, dtype=torch.float32)[:, :rank]


torch.library.register_fake("align::few_rows_product", _fake, lib=_LIBRARY)
