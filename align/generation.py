"""Responses from the resident model itself: no second copy of the base.

Rows decode side by side in slots; a row that has finished leaves, and the next waiting prompt takes its place. Sampling
is one keyed uniform a token and the inverse CDF of the softmax at the sampling temperature, so a response does not
depend on which others are generated beside it.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from align.adapters import AdaptedModel
from align.context import Sampling
from align.errors import InvariantError
from align.slots import Slots
from data.tokenization import Codec

_ENTERING_TOKENS = 8192  # computed at a time, at most: bounds the activations of entering prompts
_BLOCK = 256  # vocabulary entries whose probabilities are summed before the inverse CDF looks inside


@dataclass(frozen=True)
class Response:
    ids: tuple[int, ...]  # EOS included where the response ended
    logprobs: tuple[float, ...]  # the sampler's own, to be compared with the trainer's
    has_eos: bool


@dataclass
class _Row:
    """A response in the making."""

    number: int  # of its prompt
    ids: list[int] = field(default_factory=list[int])
    logprobs: list[float] = field(default_factory=list[float])
    has_eos: bool = False

    def response(self) -> Response:
        return Response(tuple(self.ids), tuple(self.logprobs), self.has_eos)


@torch.no_grad()
def generate(
    model: AdaptedModel,
    codec: Codec,
    prompts: list[tuple[int, ...]],
    *,
    sampling: Sampling,
    uniforms_BT: np.ndarray,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Response]:
    """One response to each prompt, under the present role. Equal prompts side by side are prefilled once.

    Args:
        prompts: token ids, each at least one.
        uniforms_BT: float64 in [0, 1), shape (len(prompts), max_response_length).
        on_progress: called with (responses done, responses in all) before each token and at the end; it may raise.
    """
    waiting = deque(range(len(prompts)))
    size = min(sampling.batch_size, len(prompts))
    slots = Slots(
        model,
        size=size,
        max_prompt=max(map(len, prompts), default=0),
        max_response=sampling.max_response_length,
        is_refilled=len(prompts) > size,
    )
    rows: list[_Row] = []  # in the order of the slots
    done: dict[int, Response] = {}
    eos = torch.tensor(codec.eos_ids, device=model.device)
    while rows or waiting:
        on_progress(len(done), len(prompts))
        entering = _next_to_enter(waiting, prompts, free=size - len(rows), size=size)
        if entering:
            stepping = [_Row(number) for number in entering]
            rows += stepping
            hidden_BH = slots.enter([prompts[number] for number in entering], pad_id=codec.pad_id)
        else:
            stepping = rows
            hidden_BH = slots.advance([row.ids[-1] for row in rows])
        _append_tokens(stepping, model.lm_head.logits(hidden_BH), sampling, uniforms_BT, eos)
        is_done = [row.has_eos or len(row.ids) == sampling.max_response_length for row in rows]
        if any(is_done):
            done |= {row.number: row.response() for row, over in zip(rows, is_done, strict=True) if over}
            rows = [rows[slot] for slot in slots.leave(is_done)]
    on_progress(len(done), len(prompts))
    return [done[number] for number in range(len(prompts))]


def _next_to_enter(waiting: deque[int], prompts: list[tuple[int, ...]], *, free: int, size: int) -> list[int]:
    """Take prompts off the queue: none before an eighth of the slots is free, since few rows at a time enter slowly."""
    if free < min(len(waiting), max(1, size // 8)):
        return []
    entering: list[int] = []
    longest = 0
    while waiting and len(entering) < free:
        longest = max(longest, len(prompts[waiting[0]]))
        if entering and longest * (len(entering) + 1) > _ENTERING_TOKENS:
            break
        entering.append(waiting.popleft())
    return entering


def _append_tokens(
    rows: Sequence[_Row], logits_BV: Tensor, sampling: Sampling, uniforms_BT: np.ndarray, eos: Tensor
) -> None:
    steps = [len(row.ids) for row in rows]
    uniforms_B = torch.from_numpy(uniforms_BT[[row.number for row in rows], steps]).to(logits_BV.device)
    is_early_B = torch.tensor([step < sampling.min_response_length for step in steps], device=logits_BV.device)
    tokens_B, logprobs_B = sample(logits_BV, uniforms_B, sampling, eos=eos, is_early_B=is_early_B)
    ends = torch.isin(tokens_B, eos).tolist()
    for row, token, logprob, end in zip(rows, tokens_B.tolist(), logprobs_B.tolist(), ends, strict=True):
        if not math.isfinite(logprob):
            raise InvariantError(
                f"the logits of response {row.number} at token {len(row.ids)} are not finite: the weights are damaged, "
                "or training has diverged; look at metrics.jsonl, and lower the learning rate"
            )
        row.ids.append(token)
        row.logprobs.append(logprob)
        row.has_eos = end


def sample(
    logits_BV: Tensor, uniforms_B: Tensor, sampling: Sampling, *, eos: Tensor, is_early_B: Tensor
) -> tuple[Tensor, Tensor]:
    """Tokens (B,) by the inverse CDF, and their logprobs (B,) under the untruncated softmax at the temperature.

    Args:
        is_early_B: bool, the rows that may not end yet.
    """
    if sampling.temperature != 1.0:
        logits_BV = logits_BV.float() / sampling.temperature
    probs_BV = torch.softmax(logits_BV, dim=-1, dtype=torch.float32)
    allowed_BV = probs_BV
    if sampling.min_response_length:
        is_eos_V = torch.isin(torch.arange(probs_BV.shape[-1], device=eos.device), eos)
        allowed_BV = allowed_BV.masked_fill(is_early_B[:, None] & is_eos_V, 0.0)
    if sampling.top_k or sampling.top_p < 1.0:
        allowed_BV = _truncate(allowed_BV, sampling)
    tokens_B = _inverse_cdf(allowed_BV, uniforms_B)  # of weights that are not finite any token: its logprob tells
    return tokens_B, probs_BV.gather(-1, tokens_B[:, None])[:, 0].log()


def _inverse_cdf(weights_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    """The first token (B,) whose running sum of weights lies above uniform · total, so never one of weight 0.

    First the block is found by the sums of blocks, then the token inside it. Sums are in float64: in float32 the last
    steps of a large vocabulary would swallow rare tokens.
    """
    size = weights_BV.shape[-1]
    whole = size // _BLOCK * _BLOCK
    sums_BK = weights_BV[:, :whole].unflatten(-1, (-1, _BLOCK)).sum(-1, dtype=torch.float64)
    if whole < size:
        sums_BK = torch.cat([sums_BK, weights_BV[:, whole:].sum(-1, keepdim=True, dtype=torch.float64)], dim=-1)
    ends_BK = sums_BK.cumsum(-1)
    targets_B1 = _below(uniforms_B[:, None] * ends_BK[:, -1:], ends_BK[:, -1:])
    blocks_B1 = torch.searchsorted(ends_BK, targets_B1, right=True).clamp(max=ends_BK.shape[-1] - 1)
    targets_B1 = targets_B1 - (ends_BK - sums_BK).gather(-1, blocks_B1)
    tokens_BN = blocks_B1 * _BLOCK + torch.arange(_BLOCK, device=weights_BV.device)
    inside_BN = weights_BV.gather(-1, tokens_BN.clamp(max=size - 1)).masked_fill(tokens_BN >= size, 0.0)
    ends_BN = inside_BN.cumsum(-1, dtype=torch.float64)
    targets_B1 = _below(targets_B1, ends_BN[:, -1:])
    return (blocks_B1 * _BLOCK + torch.searchsorted(ends_BN, targets_B1, right=True)).clamp(max=size - 1)[:, 0]


def _below(targets: Tensor, bound: Tensor) -> Tensor:
    """Rounding may put a target on its bound; then it is the largest number below."""
    return torch.minimum(targets, torch.nextafter(bound, torch.zeros_like(bound)))


def _truncate(probs_BV: Tensor, sampling: Sampling) -> Tensor:
    """Top-k and top-p (Holtzman et al. 2020): everything outside the kept set gets 0."""
    sorted_BV, order_BV = probs_BV.sort(dim=-1, descending=True, stable=True)
    sorted_BV = sorted_BV / sorted_BV.sum(-1, keepdim=True)
    rank = torch.arange(sorted_BV.shape[-1], device=sorted_BV.device)
    drop_BV = (
        (sorted_BV.cumsum(-1) - sorted_BV) >= sampling.top_p if sampling.top_p < 1.0 else rank.expand_as(sorted_BV) < 0
    )
    if sampling.top_k:
        drop_BV = drop_BV | (rank >= sampling.top_k)
    drop_BV = drop_BV & (rank > 0)  # the likeliest token always stays
    return probs_BV.masked_fill(torch.zeros_like(drop_BV).scatter(-1, order_BV, drop_BV), 0.0)
