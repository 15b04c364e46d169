"""Logprobs of given tokens from hidden states, by way of the LM head but never with logits of the whole vocabulary.

The vocabulary is walked in tiles with a running maximum and sums, as FlashAttention walks keys (Milakov & Gimelshein
2018, Online normalizer calculation for softmax; Dao et al. 2022). The gradients by the hidden state h,

    of a logprob:   ∂ log p_t / ∂h = W_t − Σ_v p_v W_v,
    of the entropy: ∂ H / ∂h = −Σ_v p_v (z_v − Σ_u p_u z_u) W_v,

are sums over the same walk, so they are taken there: the backward pass only multiplies them by the incoming gradient,
and nothing of the vocabulary's size is kept or computed twice.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from align.errors import InvariantError
from align.kernels.products import frozen_product

ROWS = 1024  # tokens walked at a time
TILE = 2048  # vocabulary entries: 8 MB of float32 logits, which stay in the cache between the two products
_FAR_BELOW = -1e30  # −∞ would make 0 · −∞ of the first rescaling


@dataclass(frozen=True)
class LMHead:
    """Logits cap(scale · (W h + b)), where cap(x) = c tanh(x / c) if there is a softcap c."""

    weight_VH: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @staticmethod
    def of(model: PreTrainedModel) -> "LMHead":
        layer, config = cast(nn.Linear, model.get_output_embeddings()), model.config.get_text_config()
        scale = 1.0
        if getattr(config, "logit_scale", None) is not None:  # Cohere
            scale = config.logit_scale
        if getattr(config, "logits_scaling", None) is not None:  # Granite
            scale = 1 / config.logits_scaling
        softcap = getattr(config, "final_logit_softcapping", None)  # Gemma
        return LMHead(layer.weight, layer.bias, scale, softcap)

    def logits(self, hidden: Tensor, tile: slice = slice(None)) -> Tensor:
        """(..., V), or a tile of the vocabulary, in the dtype of the hidden states (..., H)."""
        bias = None if self.bias_V is None else self.bias_V[tile]
        logits = frozen_product(hidden.reshape(-1, hidden.shape[-1]), self.weight_VH[tile], bias)
        logits = logits.view(*hidden.shape[:-1], logits.shape[-1])
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def slope(self, logits: Tensor) -> Tensor | None:
        """The softcap's derivative, from the logits that it made; None for 1."""
        return None if self.softcap is None else 1 - (logits / self.softcap).square()


def token_logprobs(
    head: LMHead, hidden_NH: Tensor, targets_N: Tensor, *, temperature: float = 1.0, with_entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Logprobs of the targets, and entropies in nats if asked, of the untruncated softmax(logits / temperature): (N,)
    in float32, differentiable by the hidden states alone.

    Raises:
        InvariantError: the head requires grad, which it would not get here.
    """
    if head.weight_VH.requires_grad:
        raise InvariantError("the LM head requires grad; it belongs to the frozen base")
    logprobs, entropies = [], []
    for start in range(0, max(1, len(targets_N)), ROWS):
        rows = slice(start, start + ROWS)
        is_learning = torch.is_grad_enabled() and hidden_NH.requires_grad
        found = _Walk.apply(hidden_NH[rows], targets_N[rows], head, temperature, with_entropy, is_learning)
        logprobs.append(found[0])
        entropies.append(found[1])
    return torch.cat(logprobs), torch.cat(entropies) if with_entropy else None


class _Sums:
    """Running sums over the vocabulary, rescaled when the largest logit so far, m, moves; e_v = exp(z_v − m)."""

    def __init__(self, hidden_NH: Tensor, *, is_learning: bool, with_entropy: bool) -> None:
        wide = torch.promote_types(hidden_NH.dtype, torch.float32)
        zero_N1 = hidden_NH.new_zeros((len(hidden_NH), 1), dtype=wide)
        self.largest = zero_N1 + _FAR_BELOW
        self.total = zero_N1  # Σ e
        self.spread = zero_N1 if with_entropy else None  # Σ e (z − m)
        self.pull = torch.zeros_like(hidden_NH, dtype=wide) if is_learning else None  # Σ e W
        self.tilt = torch.zeros_like(hidden_NH, dtype=wide) if is_learning and with_entropy else None  # Σ e (z − m) W

    def add(self, logits_NT: Tensor, slope_NT: Tensor | None, weight_TH: Tensor) -> None:
        """Take in a tile; `logits_NT` is used up. The slope of the softcap belongs to W, not to e."""
        before, self.largest = self.largest, torch.maximum(self.largest, logits_NT.amax(-1, keepdim=True))
        moved = before - self.largest
        shrink = moved.exp()
        below_NT = logits_NT.sub_(self.largest)
        exp_NT = below_NT.exp_() if self.spread is None else below_NT.exp()
        if self.spread is not None:
            tilted_NT = below_NT.mul_(exp_NT)
            if self.tilt is not None and self.pull is not None:
                self.tilt.add_(moved * self.pull).mul_(shrink).add_(_product(tilted_NT, slope_NT, weight_TH))
            self.spread = (self.spread + moved * self.total) * shrink + tilted_NT.sum(-1, keepdim=True)
        if self.pull is not None:
            self.pull.mul_(shrink).add_(_product(exp_NT, slope_NT, weight_TH))
        self.total = self.total * shrink + exp_NT.sum(-1, keepdim=True)


def _product(values_NT: Tensor, slope_NT: Tensor | None, weight_TH: Tensor) -> Tensor:
    values_NT = values_NT if slope_NT is None else values_NT * slope_NT
    return frozen_product(values_NT.to(weight_TH.dtype), weight_TH.t())


class _Walk(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, targets_N: Tensor, head: LMHead, temperature: float, with_entropy: bool,
        is_learning: bool,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        sums = _Sums(hidden_NH, is_learning=is_learning, with_entropy=with_entropy)
        chosen_N1, chosen_slope_N1 = torch.zeros_like(sums.total), torch.ones_like(sums.total)
        for start in range(0, len(head.weight_VH), TILE):
            tile = slice(start, start + TILE)
            logits_NT = head.logits(hidden_NH, tile).to(sums.total.dtype)
            slope_NT = head.slope(logits_NT) if is_learning else None
            logits_NT = logits_NT if temperature == 1.0 else logits_NT.div_(temperature)
            places_N1 = (targets_N - start)[:, None]
            is_here_N1 = (places_N1 >= 0) & (places_N1 < logits_NT.shape[-1])
            places_N1 = places_N1.clamp(0, logits_NT.shape[-1] - 1)
            chosen_N1 = torch.where(is_here_N1, logits_NT.gather(-1, places_N1), chosen_N1)
            if slope_NT is not None:
                chosen_slope_N1 = torch.where(is_here_N1, slope_NT.gather(-1, places_N1), chosen_slope_N1)
            sums.add(logits_NT, slope_NT, head.weight_VH[tile])
        log_total_N1 = sums.total.log()
        mean_N1 = None if sums.spread is None else sums.spread / sums.total  # of z − m under p
        if is_learning:
            assert sums.pull is not None
            factor, mean_pull_NH = head.scale / temperature, sums.pull / sums.total
            by_logprob_NH = factor * (chosen_slope_N1 * head.weight_VH[targets_N] - mean_pull_NH)
            by_entropy_NH = None
            if sums.tilt is not None and mean_N1 is not None:
                by_entropy_NH = factor * (mean_N1 * mean_pull_NH - sums.tilt / sums.total)
            ctx.save_for_backward(by_logprob_NH, by_entropy_NH)
            ctx.dtype = hidden_NH.dtype
        entropy_N = None if mean_N1 is None else (log_total_N1 - mean_N1)[:, 0].float()
        return (chosen_N1 - sums.largest - log_total_N1)[:, 0].float(), entropy_N

    @staticmethod
    @once_differentiable  # it has no types, so pyright misses the name of ctx
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        by_logprob_NH, by_entropy_NH = ctx.saved_tensors
        by_logprob, by_entropy = gradients
        total_NH = torch.zeros_like(by_logprob_NH) if by_logprob is None else by_logprob[:, None] * by_logprob_NH
        if by_entropy is not None and by_entropy_NH is not None:
            total_NH = total_NH + by_entropy[:, None] * by_entropy_NH
        return total_NH.to(ctx.dtype), None, None, None, None, None
