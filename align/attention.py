"""Attention of one new token over a key/value cache, without a copy of keys and values for each query head.

transformers' `sdpa` repeats keys and values for grouped queries whenever there is a mask, in each layer at each token:
with three query heads a group that is most of what decoding moves. The queries of a group are one batch of rows
against the same keys, so they stand side by side instead; the numbers are the same.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

_NAME = "align_sdpa"


def use_grouped_attention(model: PreTrainedModel) -> None:
    """Where the model would use `sdpa`, use this; what has an attention of its own keeps it."""
    AttentionInterface.register(_NAME, _attend)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    if model.config._attn_implementation == "sdpa":  # pyright: ignore[reportPrivateUsage]
        model.set_attn_implementation(_NAME)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """query (B, heads, S, D), key and value (B, groups, L, D), mask (B, 1, S, L) → (B, S, heads, D)."""
    batch, num_heads, length, _ = query.shape
    num_groups = key.shape[1]
    if length > 1 or num_heads == num_groups or options.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    grouped = query.view(batch, num_groups, num_heads // num_groups, -1)
    dropout, scale = options.get("dropout", 0.0), options.get("scaling")
    out = torch.nn.functional.scaled_dot_product_attention(
        grouped, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scale
    )
    return out.view(batch, 1, num_heads, -1), None
