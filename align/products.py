"""The product with a frozen weight, which is most of what a base computes."""

import os

import torch
from torch import Tensor

_FEW_ROWS = 32  # decoding: up to here MKL is twice as fast with the weight first; at 64 rows there is no difference

# oneDNN's own cache of kernels, and torch's before it. By default 1,024 each, of up to 1 MB: one for each shape of a
# product, and with rows of all lengths there is always a new shape.
_KERNEL_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
_KERNELS = 64  # a pass and its backward pass over a layer need some 30


def bound_kernel_caches() -> None:
    """Keep a CPU's bfloat16 products from holding up to a gigabyte of kernels. To be called before the first of them;
    what the user has set stands."""
    for name in _KERNEL_CACHES:
        os.environ.setdefault(name, str(_KERNELS))


def frozen_product(x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """x Wᵀ + b: (N, O), contiguous."""
    if len(x_NI) <= _FEW_ROWS and x_NI.device.type == "cpu" and x_NI.dtype == torch.float32:
        y_NO = torch.mm(weight_OI, x_NI.t()).t().contiguous()
        return y_NO if bias_O is None else y_NO.add_(bias_O)
    return torch.mm(x_NI, weight_OI.t()) if bias_O is None else torch.addmm(bias_O, x_NI, weight_OI.t())
