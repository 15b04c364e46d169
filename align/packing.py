"""Rows packed so that what several of them begin with stands, and is computed, once; and without padding.

A causal model says of a token what follows from it and those before it. So tokens that follow the same tokens in
several rows, as a system prompt does in all and a prompt in those that answer it, need one place: a batch (B, L) is
packed into one row (1, N) of its distinct tokens, as a prefix tree would hold them. Embeddings, norms and products,
nearly all the work, know no rows and need not be told. Attention does: it unpacks the rows, and goes on as ever, or
takes their tokens from where they stand (`align.kernels.row_attention`). Values and gradients are the same but for
rounding.
(What TRL calls packing puts rows end to end, and shares nothing.)
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakIdKeyDictionary

_LEAST_SAVED = 1 / 8  # of a batch's places: below, it is not worth its while where each layer unpacks the rows
_present: "PackedRows | None" = None


@dataclass(frozen=True)
class PackedRows:
    """Where the N distinct tokens of right-padded rows (B, L) stand."""

    first_N: Tensor  # int64, as all these: the place in B·L of each packed token, or of the first of its equals
    packed_BL: Tensor  # the packed token of each place; of padding any
    lengths_B: Tensor  # tokens of each row
    shared_B: Tensor  # how many of them, from its begin on, stand in an earlier row, too
    equals: tuple[tuple[Tensor, Tensor], ...]  # the packed tokens (K,) that stand for C, and their places (K, C)
    stay_packed: bool  # attention has to take them as they stand

    @staticmethod
    def of(ids_BL: Tensor, is_token_BL: Tensor, *, stay_packed: bool = False) -> "PackedRows | None":
        """None if packing would save too little. What stays packed always is: then one graph of a compiled layer does
        for all batches, as it could not if it unpacked them."""
        (num_rows, length), device = ids_BL.shape, ids_BL.device
        is_same_BBL = (ids_BL[:, None] == ids_BL) & is_token_BL[:, None] & is_token_BL
        begins_alike_BBL = is_same_BBL.to(torch.uint8).cumprod(-1, dtype=torch.uint8)
        first_row_BL = begins_alike_BBL.argmax(1)  # the first of several that are largest
        is_first_BL = is_token_BL & (first_row_BL == torch.arange(num_rows, device=device)[:, None])
        first_N = is_first_BL.flatten().nonzero()[:, 0]
        if not stay_packed and len(first_N) > (1 - _LEAST_SAVED) * ids_BL.numel():
            return None
        number_BL = (is_first_BL.flatten().cumsum(0) - 1).view(num_rows, length)
        packed_BL = number_BL.gather(0, first_row_BL).clamp(min=0)
        places_T = is_token_BL.flatten().nonzero()[:, 0]
        equals = _equals(packed_BL.flatten()[places_T], places_T)
        lengths_B = is_token_BL.sum(1)
        shared_B = lengths_B - is_first_BL.sum(1)
        return PackedRows(first_N, packed_BL, lengths_B, shared_B, equals, stay_packed)

    @property
    def shape(self) -> torch.Size:
        """(B, L). Of a tensor: a number of its own would make another graph of a compiled layer for each length."""
        return self.packed_BL.shape

    def pack(self, rows: Tensor) -> Tensor:
        """(1, N, ...) from (B, L, ...), which must be the same wherever the tokens are."""
        return cast(Tensor, _Pack.apply(rows.flatten(0, 1), self))[None]

    def unpack(self, packed: Tensor, dim: int = 1) -> Tensor:
        """(B, L, ...) from (1, N, ...), or with another `dim` for the tokens. What stands at padding is arbitrary."""
        packed_N = packed.squeeze(0).movedim(dim - 1, 0)
        return cast(Tensor, _Unpack.apply(packed_N, self)).unflatten(0, self.shape).movedim(1, dim)

    @property
    def position_ids(self) -> Tensor:
        """(1, N): each token's place in its row."""
        return (self.first_N % self.shape[1])[None]


def _equals(packed_at_T: Tensor, places_T: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
    """`PackedRows.equals` of tokens at these places."""
    counts_N = packed_at_T.bincount()
    starts_N = counts_N.cumsum(0) - counts_N
    sorted_T = places_T[packed_at_T.argsort(stable=True)]
    found: list[tuple[Tensor, Tensor]] = []
    for count in counts_N[counts_N > 1].unique().tolist():
        tokens_K = (counts_N == count).nonzero()[:, 0]
        found.append((tokens_K, sorted_T[starts_N[tokens_K, None] + torch.arange(count, device=starts_N.device)]))
    return tuple(found)


class _Pack(torch.autograd.Function):
    """(N, ...) from (B·L, ...): of equals the first."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, packing: PackedRows) -> Tensor:
        ctx.packing = packing
        return rows.index_select(0, packing.first_N)

    @staticmethod
    @once_differentiable  # it has no types, so pyright misses the name of ctx
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        packing: PackedRows = ctx.packing
        rows = gradients[0].new_zeros(packing.packed_BL.numel(), *gradients[0].shape[1:])
        return rows.index_copy_(0, packing.first_N, gradients[0]), None


class _Unpack(torch.autograd.Function):
    """(B·L, ...) from (N, ...). Gradients of equals are summed the same way each time, on a GPU too."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, packing: PackedRows) -> Tensor:
        ctx.packing = packing
        return packed.index_select(0, packing.packed_BL.flatten())

    @staticmethod
    @once_differentiable  # it has no types, so pyright misses the name of ctx
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        packing: PackedRows = ctx.packing
        packed = gradients[0].index_select(0, packing.first_N)
        for tokens_K, places_KC in packing.equals:
            equals = gradients[0].index_select(0, places_KC.flatten()).unflatten(0, places_KC.shape)
            packed.index_copy_(0, tokens_K, equals.sum(1))
        return packed, None


class Packings:
    """How batches stand packed, found out once for each and kept as long as its ids live, which must stay as they are
    and have one mask."""

    def __init__(self, longest: float = 0, *, stay_packed: bool = False) -> None:
        self.longest = longest  # tokens of a row (`longest_packed`)
        self._stay_packed = stay_packed
        self._found: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def of(self, ids_BL: Tensor, is_token_BL: Tensor | None) -> PackedRows | None:
        """`PackedRows.of`; None, too, of rows longer than may be packed. `is_token_BL`: None if there is no padding."""
        if not 1 < ids_BL.shape[1] <= self.longest:
            return None
        if ids_BL not in self._found:
            is_token_BL = torch.ones_like(ids_BL, dtype=torch.bool) if is_token_BL is None else is_token_BL
            self._found[ids_BL] = PackedRows.of(ids_BL, is_token_BL, stay_packed=self._stay_packed)
        return self._found[ids_BL]


def present() -> PackedRows | None:
    """Of the pass that is running, for attention."""
    return _present


class _PackedAs(AbstractContextManager[None]):
    """May be entered again after it was left, as a checkpoint's context may have to be."""

    def __init__(self, packing: PackedRows | None) -> None:
        self._packing = packing

    def __enter__(self) -> None:
        global _present
        self._before, _present = _present, self._packing

    def __exit__(self, *_: object) -> None:
        global _present
        _present = self._before


def packed_again() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """`context_fn` of torch's checkpoint: what a layer computes again for the backward pass, when the pass is over, is
    of the same rows."""
    return nullcontext(), _PackedAs(_present)


def last_hidden(trunk: nn.Module, ids_BS: Tensor, packing: PackedRows | None, **inputs: Any) -> Tensor:
    """The trunk's last hidden states (B, S, H) of right-padded rows; at padding they are arbitrary."""
    if packing is None:
        return trunk(input_ids=ids_BS, **inputs).last_hidden_state
    with _PackedAs(packing):
        ids_1N = packing.pack(ids_BS)
        hidden_1NH = trunk(input_ids=ids_1N, position_ids=packing.position_ids, **inputs).last_hidden_state
    return packing.unpack(hidden_1NH)


def longest_packed(
    trunk: nn.Module, config: Any, *, device: torch.device, dtype: torch.dtype, stay_packed: bool = False
) -> float:
    """Tokens of a row, at most, for the trunk to say of packed rows what it says of each by itself.

    0 if a layer passes on by other ways than attention, or counts tokens rather than take their positions; else what
    all its layers see. Its attention must be ours (`align.attention`), which may unpack them unless they have to
    `stay_packed`. `config`: transformers' text config.
    """
    if getattr(config, "attn_temperature_tuning", False):  # Llama 4, of tokens beyond some thousands
        return 0
    windows = (getattr(config, key, None) for key in ("sliding_window", "attention_chunk_size"))
    window = min((window for window in windows if window is not None), default=float("inf"))
    return window if _can_pack(trunk, device=device, dtype=dtype, stay_packed=stay_packed) else 0


@torch.no_grad()
def _can_pack(trunk: nn.Module, *, device: torch.device, dtype: torch.dtype, stay_packed: bool) -> bool:
    ids_BS = torch.tensor([[1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 8, 9, 0, 0]], device=device)
    is_token_BS = ids_BS > 0
    packing = PackedRows.of(ids_BS, is_token_BS, stay_packed=stay_packed)
    assert packing is not None
    alone_NH = last_hidden(trunk, ids_BS, None, use_cache=False)[is_token_BS].float()
    try:
        packed_NH = last_hidden(trunk, ids_BS, packing, use_cache=False)[is_token_BS].float()
    except Exception as error:  # it takes no such positions, sees other rows, or would have to unpack them
        if should_reduce_batch_size(error):
            raise
        return False
    tolerance = torch.finfo(dtype).eps ** 0.5  # relative; SmolLM2 with the wrong positions is at 0.12
    return bool(((packed_NH - alone_NH).norm(dim=-1) <= tolerance * alone_NH.norm(dim=-1)).all())
