"""One update's episodes, composed into micro-batches and scored by every role.

Micro-batches are composed here once, sorted by length, and kept whole from now on: old logprobs, reference logprobs,
values and scores come from no-grad passes over the very batches that are learnt from, by the same kernels. So the
first minibatch's ratio is 1 and the first KL is 0 in every dtype.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from align.adapters import AdaptedModel
from align.episodes import Episode, EpisodeBatch, collate, policy_pass, value_pass
from align.heads import ScalarHead
from align.rewards import RewardSources
from data.batching import length_sorted_batches

REFERENCE = "sft"  # the frozen sft adapter; adapters switched off would be the raw base
POLICY = "policy"
VALUE = "value"


@dataclass(frozen=True)
class Critic:
    """A value head on the policy's trunk, or on an adapter of its own."""

    head: ScalarHead
    has_adapter: bool

    @property
    def trunk_head(self) -> ScalarHead | None:
        """The head, if it is on the policy's trunk."""
        return None if self.has_adapter else self.head


@dataclass(frozen=True)
class MicroBatch:
    """Some episodes and what the roles say of them. Padding holds 0."""

    batch: EpisodeBatch
    is_response_BT: Tensor  # bool
    has_eos_B: Tensor  # bool
    group_B: Tensor  # int64: which of the rollout's prompts each episode answers
    logprobs_BT: Tensor  # float32, of the policy as it was when the rollout was made
    ref_logprobs_BT: Tensor  # float32
    entropy_BT: Tensor  # float32, nats
    values_BT: Tensor  # float32; 0 without a critic
    scores: Mapping[str, Tensor]  # float32 (B,), each reward source's own


@dataclass(frozen=True)
class Rollout:
    micro_batches: tuple[MicroBatch, ...]
    sampler_gap_max: float  # largest |sampler's logprob − trainer's|, nats
    sampler_gap_mean: float


@torch.no_grad()
def score(
    model: AdaptedModel,
    episodes: list[Episode],
    sources: RewardSources,
    critic: Critic | None,
    *,
    micro_batch_size: int,
    temperature: float,
    pad_id: int,
    on_step: Callable[[], None] = lambda: None,
) -> Rollout:
    """Compose the micro-batches and let policy, reference, reward sources and critic each go over them. `on_step` is
    called before each of them; it may raise."""
    lengths = [len(e.prompt_ids) + len(e.response_ids) for e in episodes]
    micro_batches: list[MicroBatch] = []
    gaps: list[Tensor] = []
    for group in length_sorted_batches(lengths, micro_batch_size):
        on_step()
        chosen = [episodes[i] for i in group]
        batch = collate(chosen, pad_id=pad_id, device=model.device)
        with model.role(POLICY):
            policy = policy_pass(
                model,
                batch,
                temperature=temperature,
                value_head=critic and critic.trunk_head,
                with_entropy=True,
            )
        with model.role(REFERENCE):
            reference = policy_pass(model, batch, temperature=temperature)
        values_BT = torch.zeros_like(policy.logprobs_BT) if policy.values_BT is None else policy.values_BT
        if critic is not None and critic.has_adapter:
            with model.role(VALUE):
                values_BT = value_pass(model, critic.head, batch)
        assert policy.entropy_BT is not None
        micro_batches.append(
            MicroBatch(
                batch=batch,
                is_response_BT=batch.is_response_BT,
                has_eos_B=torch.tensor([e.has_eos for e in chosen], device=model.device),
                group_B=torch.tensor([e.group for e in chosen], device=model.device),
                logprobs_BT=policy.logprobs_BT,
                ref_logprobs_BT=reference.logprobs_BT,
                entropy_BT=policy.entropy_BT,
                values_BT=values_BT,
                scores=sources.score(batch, chosen),
            )
        )
        sampled = torch.tensor([x for e in chosen for x in e.sampler_logprobs], device=model.device)
        gaps.append((policy.logprobs_BT[batch.is_response_BT] - sampled).abs())
    gap = torch.cat(gaps)
    return Rollout(tuple(micro_batches), gap.max().item(), gap.mean().item())
