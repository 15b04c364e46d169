"""The product with a frozen weight, which is most of what a base computes."""

import torch
from torch import Tensor

_FEW_ROWS = 32  # decoding: up to here MKL is twice as fast with the weight first; at 64 rows there is no difference


def frozen_product(x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """x Wᵀ + b: (N, O), contiguous."""
    if len(x_NI) <= _FEW_ROWS and x_NI.device.type == "cpu" and x_NI.dtype == torch.float32:
        y_NO = torch.mm(weight_OI, x_NI.t()).t().contiguous()
        return y_NO if bias_O is None else y_NO.add_(bias_O)
    return torch.mm(x_NI, weight_OI.t()) if bias_O is None else torch.addmm(bias_O, x_NI, weight_OI.t())
