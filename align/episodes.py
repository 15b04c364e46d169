"""Episodes (one prompt and one response) and the no-frills passes over them: logprobs, values, scores.

Batches are right-padded, so positions need no care; a response's token t is predicted from the hidden state at
position prompt_length + t − 1. Only response tokens go through the LM head, and never as full-vocabulary logits
(`align.logprobs`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from align.adapters import AdaptedModel
from align.heads import ScalarHead
from align.logprobs import token_logprobs
from data.batching import right_pad
from data.tokenization import TokenizedDemonstration


@dataclass(frozen=True)
class Episode:
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]  # EOS included where the response ended
    has_eos: bool
    sampler_logprobs: tuple[float, ...] = ()  # of the response's tokens, where a sampler of ours drew them
    prompt_text: str = ""  # for scorers that read text
    group: int = 0  # which of the rollout's prompts it answers


@dataclass(frozen=True)
class EpisodeBatch:
    ids_BS: Tensor  # int64, right-padded
    is_token_BS: Tensor  # bool
    prompt_length_B: Tensor  # int64
    response_length_B: Tensor  # int64, at least 1

    @cached_property
    def is_response_BT(self) -> Tensor:
        """bool (B, T), T the longest response of this batch."""
        length = int(self.response_length_B.max())
        return torch.arange(length, device=self.ids_BS.device)[None] < self.response_length_B[:, None]

    @cached_property
    def response_positions_BT(self) -> Tensor:
        """int64 (B, T): where each response token stands in ids_BS; past the response, its last token's place."""
        steps = torch.arange(int(self.response_length_B.max()), device=self.ids_BS.device)[None]
        return self.prompt_length_B[:, None] + torch.minimum(steps, self.response_length_B[:, None] - 1)


@dataclass(frozen=True)
class PolicyPass:
    """Padding holds 0. `entropy_BT` and `values_BT` are None if they were not asked for."""

    logprobs_BT: Tensor  # float32, of the softmax at the sampling temperature
    entropy_BT: Tensor | None
    values_BT: Tensor | None  # float32: the state before each response token


def collate(episodes: list[Episode], *, pad_id: int, device: torch.device) -> EpisodeBatch:
    ids_BS, is_token_BS = right_pad([e.prompt_ids + e.response_ids for e in episodes], pad_id, device)
    return EpisodeBatch(
        ids_BS,
        is_token_BS,
        torch.tensor([len(e.prompt_ids) for e in episodes], device=device),
        torch.tensor([len(e.response_ids) for e in episodes], device=device),
    )


def policy_pass(
    model: AdaptedModel,
    batch: EpisodeBatch,
    *,
    temperature: float = 1.0,
    value_head: ScalarHead | None = None,
    with_entropy: bool = False,
    is_checkpointed: bool = False,
) -> PolicyPass:
    """Logprobs of the response tokens under the present role, with values from the same trunk if a head is given."""
    hidden_BSH = model.hidden(batch.ids_BS, batch.is_token_BS, is_checkpointed=is_checkpointed)
    is_response_BT = batch.is_response_BT
    positions_BT = batch.response_positions_BT
    rows_N, steps_N = is_response_BT.nonzero(as_tuple=True)
    positions_N = positions_BT[rows_N, steps_N]
    before_NH = hidden_BSH[rows_N, positions_N - 1]
    targets_N = batch.ids_BS[rows_N, positions_N]
    logprobs_N, entropy_N = token_logprobs(
        model.lm_head, before_NH, targets_N, temperature=temperature, with_entropy=with_entropy
    )
    values_N = value_head(before_NH)[:, 0] if value_head is not None else None

    def scatter(values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        return values.new_zeros(is_response_BT.shape).index_put((rows_N, steps_N), values)

    logprobs_BT = scatter(logprobs_N)
    assert logprobs_BT is not None
    return PolicyPass(logprobs_BT, scatter(entropy_N), scatter(values_N))


def text_pass(
    model: AdaptedModel, rows: Sequence[TokenizedDemonstration], *, pad_id: int, is_checkpointed: bool = False
) -> Tensor:
    """Logprobs (N,) float32 of the learnt tokens of all rows together, under the present role, at temperature 1."""
    ids_BS, is_token_BS = right_pad([row.ids for row in rows], pad_id, model.device)
    is_learnt_BS, _ = right_pad([row.is_response for row in rows], 0, model.device)
    hidden_BSH = model.hidden(ids_BS, is_token_BS, is_checkpointed=is_checkpointed)
    return learnt_logprobs(model, hidden_BSH, ids_BS, is_learnt_BS)


def learnt_logprobs(model: AdaptedModel, hidden_BSH: Tensor, ids_BS: Tensor, is_learnt_BS: Tensor) -> Tensor:
    """Logprobs (N,) float32 of the learnt tokens, at temperature 1, from the last hidden states of their rows."""
    at_N, before_N = is_learnt_BS[:, 1:].nonzero(as_tuple=True)  # nothing predicts a row's first token
    return token_logprobs(model.lm_head, hidden_BSH[at_N, before_N], ids_BS[at_N, before_N + 1])[0]


def value_pass(model: AdaptedModel, head: ScalarHead, batch: EpisodeBatch, *, is_checkpointed: bool = False) -> Tensor:
    """Values (B, T) float32 of the state before each response token, under the present role; padding holds 0."""
    hidden_BSH = model.hidden(batch.ids_BS, batch.is_token_BS, is_checkpointed=is_checkpointed)
    rows_B1 = torch.arange(len(hidden_BSH), device=hidden_BSH.device)[:, None]
    return head(hidden_BSH[rows_B1, batch.response_positions_BT - 1])[..., 0] * batch.is_response_BT


def score_pass(model: AdaptedModel, head: ScalarHead, batch: EpisodeBatch) -> Tensor:
    """The reward model's score (B,) float32 at the real last token of each episode, under the present role."""
    hidden_BSH = model.hidden(batch.ids_BS, batch.is_token_BS)
    last_B = batch.prompt_length_B + batch.response_length_B - 1
    return head(hidden_BSH[torch.arange(len(last_B), device=last_B.device), last_B])[:, 0]
