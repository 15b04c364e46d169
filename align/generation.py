"""Responses from the resident model itself: no second copy of the base.

Sampling is one keyed uniform a token and the inverse CDF of the softmax at the sampling temperature, so a response
does not depend on which others are generated beside it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from align.adapters import AdaptedModel
from align.context import Sampling
from data.batching import left_pad
from data.tokenization import Codec


@dataclass(frozen=True)
class Response:
    ids: tuple[int, ...]  # EOS included where the response ended
    logprobs: tuple[float, ...]  # the sampler's own, to be compared with the trainer's
    has_eos: bool


@torch.no_grad()
def generate(
    model: AdaptedModel,
    codec: Codec,
    prompts: list[tuple[int, ...]],
    *,
    sampling: Sampling,
    uniforms_BT: np.ndarray,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Response]:
    """One response to each prompt, under the present role.

    Args:
        prompts: token ids, each at least one.
        uniforms_BT: float64 in [0, 1), shape (len(prompts), max_response_length).
        on_progress: called with (responses done, responses in all).
    """
    responses: list[Response] = []
    for start in range(0, len(prompts), sampling.batch_size):
        chunk = slice(start, start + sampling.batch_size)
        responses += _generate_batch(model, codec, prompts[chunk], sampling, uniforms_BT[chunk])
        if on_progress is not None:
            on_progress(len(responses), len(prompts))
    return responses


def _generate_batch(
    model: AdaptedModel, codec: Codec, prompts: list[tuple[int, ...]], sampling: Sampling, uniforms_BT: np.ndarray
) -> list[Response]:
    """Rows that have finished leave the batch (and the key/value cache), so that they stop costing."""
    uniforms = torch.from_numpy(uniforms_BT).to(model.device)
    eos = torch.tensor(codec.eos_ids, device=model.device)
    ids_BS, is_token_BS = left_pad(prompts, codec.pad_id, model.device)
    cache = DynamicCache(config=model.base.model.config)
    rows = torch.arange(len(prompts), device=model.device)  # which prompt each row of the batch belongs to
    tokens: list[list[int]] = [[] for _ in prompts]
    logprobs: list[list[float]] = [[] for _ in prompts]
    finished = torch.zeros(len(prompts), dtype=torch.bool, device=model.device)
    has_eos = [False] * len(prompts)
    next_ids = ids_BS
    for step in range(sampling.max_response_length):
        logits_BV = _next_logits(model, next_ids, is_token_BS, cache)
        chosen_B, logprob_B = sample(logits_BV, uniforms[rows, step], sampling, eos, step)
        is_last_B = torch.isin(chosen_B, eos)
        for row, token, logprob, last, done in zip(
            rows.tolist(), chosen_B.tolist(), logprob_B.tolist(), is_last_B.tolist(), finished.tolist(), strict=True
        ):
            if not done:
                tokens[row].append(token)
                logprobs[row].append(logprob)
                has_eos[row] = last
        finished |= is_last_B
        if finished.all():
            break
        next_ids = chosen_B[:, None]
        is_token_BS = torch.cat([is_token_BS, torch.ones_like(is_token_BS[:, :1])], dim=1)
        if finished.sum() * 4 >= len(finished):  # copying the cache pays once a quarter of the rows can go
            keep = (~finished).nonzero()[:, 0]
            cache.batch_select_indices(keep)
            next_ids, is_token_BS, rows, finished = next_ids[keep], is_token_BS[keep], rows[keep], finished[keep]
    return [Response(tuple(t), tuple(lp), e) for t, lp, e in zip(tokens, logprobs, has_eos, strict=True)]


def _next_logits(model: AdaptedModel, ids_BS: Tensor, is_token_BS: Tensor, cache: DynamicCache) -> Tensor:
    """Logits (B, V) after the last token. Under left padding positions count real tokens only."""
    position_ids = (is_token_BS.long().cumsum(-1) - 1).clamp(min=0)[:, -ids_BS.shape[1] :]
    out = model.trunk(
        input_ids=ids_BS,
        attention_mask=is_token_BS.long(),
        position_ids=position_ids,
        past_key_values=cache,
        use_cache=True,
    )
    return model.logits(out.last_hidden_state[:, -1])


def sample(logits_BV: Tensor, uniforms_B: Tensor, sampling: Sampling, eos: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """Tokens (B,) by the inverse CDF, and their logprobs (B,) under the untruncated softmax at the temperature.

    The CDF is summed in float64: in float32 its last step would swallow rare tokens of a large vocabulary.
    """
    logprobs_BV = torch.log_softmax(logits_BV.float() / sampling.temperature, dim=-1)
    allowed_BV = logprobs_BV
    if step < sampling.min_response_length:
        allowed_BV = allowed_BV.index_fill(-1, eos, -torch.inf)
    if sampling.top_k or sampling.top_p < 1.0:
        allowed_BV = _truncate(allowed_BV, sampling)
    cdf_BV = allowed_BV.exp().cumsum(-1, dtype=torch.float64)
    targets_B1 = uniforms_B[:, None] * cdf_BV[:, -1:]
    # right=True: the first token whose CDF lies above the target, so one of probability 0 is never taken
    tokens_B1 = torch.searchsorted(cdf_BV, targets_B1, right=True).clamp(max=logits_BV.shape[-1] - 1)
    return tokens_B1[:, 0], logprobs_BV.gather(-1, tokens_B1)[:, 0]


def _truncate(logprobs_BV: Tensor, sampling: Sampling) -> Tensor:
    """Top-k and top-p (Holtzman et al. 2020): everything outside the kept set gets −inf."""
    sorted_BV, order_BV = logprobs_BV.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(sorted_BV.shape[-1], device=sorted_BV.device)
    probs_BV = sorted_BV.softmax(-1)
    drop_BV = (
        (probs_BV.cumsum(-1) - probs_BV) >= sampling.top_p if sampling.top_p < 1.0 else rank.expand_as(probs_BV) < 0
    )
    if sampling.top_k:
        drop_BV = drop_BV | (rank >= sampling.top_k)
    drop_BV = drop_BV & (rank > 0)  # the likeliest token always stays
    return logprobs_BV.masked_fill(torch.zeros_like(drop_BV).scatter(-1, order_BV, drop_BV), -torch.inf)
