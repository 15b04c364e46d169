"""Attention where `sdpa` of transformers and torch does needless work, and the one place where packed rows
(`align.packing`) stand apart. What it says is the same.

Decoding: `sdpa` repeats keys and values for grouped queries whenever there is a mask, in each layer at each token: with
three query heads a group that is most of what decoding moves. The queries of a group are one batch of rows against the
same keys, so they stand side by side instead.

Learning: a mask that only hides padding on the right is not needed, since causal attention never looks there; without
one, nothing is repeated either, and on a CPU short rows go to `align.kernels.row_attention`.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from align import packing
from align.errors import InvariantError
from align.kernels import row_attention

_NAME = "align_sdpa"


def use_own_attention(model: PreTrainedModel) -> None:
    """Where the model would use `sdpa`, use this; what has an attention of its own keeps it."""
    AttentionInterface.register(_NAME, _attend)
    AttentionMaskInterface.register(_NAME, _mask)
    if model.config._attn_implementation == "sdpa":  # pyright: ignore[reportPrivateUsage]
        model.set_attn_implementation(_NAME)


def has_own_attention(model: PreTrainedModel) -> bool:
    """Whether all its attention is this."""
    return model.config.get_text_config()._attn_implementation == _NAME  # pyright: ignore[reportPrivateUsage]


def _mask(
    batch_size: int, q_length: int, kv_length: int, *args: Any, attention_mask: Tensor | None = None, **options: Any
) -> Tensor | None:
    """What `sdpa_mask` makes of it. Packed rows need no mask, nor does padding on the right of whole rows, for those
    who pass one nevertheless."""
    if packing.present() is not None:
        return None
    if (
        attention_mask is not None
        and q_length == kv_length == attention_mask.shape[-1]
        and not torch.compiler.is_compiling()
    ):
        is_token_BS = attention_mask.bool()
        if bool((is_token_BS[:, :-1] >= is_token_BS[:, 1:]).all()):
            attention_mask = None
    return sdpa_mask(batch_size, q_length, kv_length, *args, attention_mask=attention_mask, **options)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """query (B, heads, S, D), key and value (B, groups, L, D), mask (B, 1, S, L) → (B, S, heads, D). Packed rows
    come as (1, heads, N, D), and go as (1, N, heads, D)."""
    packed = packing.present()
    if _is_plain(module, attention_mask, options) and row_attention.fits(query, key, value, packed):
        scale = options.get("scaling")
        return row_attention.attend(query, key, value, packed, query.shape[3] ** -0.5 if scale is None else scale), None
    if packed is None:
        return _attend_rows(module, query, key, value, attention_mask, **options)
    if packed.stay_packed:
        raise InvariantError("attention would have to unpack rows that have to stay packed")
    query, key, value = (packed.unpack(states, dim=2) for states in (query, key, value))
    return packed.pack(_attend_rows(module, query, key, value, attention_mask, **options)[0]), None


def _attend_rows(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    batch, num_heads, length, _ = query.shape
    num_groups = key.shape[1]
    is_of_heads = attention_mask is not None and attention_mask.shape[1] > 1
    if length > 1 or num_heads == num_groups or is_of_heads or options.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    grouped = query.view(batch, num_groups, num_heads // num_groups, -1)
    dropout, scale = options.get("dropout", 0.0), options.get("scaling")
    out = torch.nn.functional.scaled_dot_product_attention(
        grouped, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scale
    )
    return out.reshape(batch, 1, num_heads, -1), None  # CUDA has kernels that leave it in another layout


def _is_plain(module: nn.Module, mask: Tensor | None, options: dict[str, Any]) -> bool:
    """Whether it is causal attention and nothing else."""
    is_causal = options.get("is_causal")
    return (
        mask is None
        and bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        and not options.get("dropout")
        and options.get("position_bias") is None
    )
