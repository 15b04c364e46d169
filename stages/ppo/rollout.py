"""One update's episodes: generated, composed into micro-batches, then looked at by every role.

Micro-batches are composed here once, sorted by length, and kept whole from now on: old logprobs, reference logprobs,
values and scores come from no-grad passes over the very batches that are learnt from, by the same kernels. So the
first minibatch's ratio is 1 and the first KL is 0 in every dtype.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from align.adapters import AdaptedModel
from align.context import Sampling
from align.episodes import Episode, EpisodeBatch, collate, policy_pass, score_pass, value_pass
from align.generation import generate
from align.heads import ScalarHead
from align.randomness import keyed_uniforms, permutation
from data.batching import length_sorted_batches
from data.tokenization import Codec

REFERENCE = "sft"  # the frozen sft adapter; adapters switched off would be the raw base
POLICY = "policy"
REWARD = "reward"
VALUE = "value"


@dataclass(frozen=True)
class Heads:
    reward: ScalarHead
    value: ScalarHead
    critic_is_adapter: bool  # else the value head sits on the policy's trunk


@dataclass(frozen=True)
class MicroBatch:
    """Some episodes and what the roles say of them. Padding holds 0."""

    batch: EpisodeBatch
    is_response_BT: Tensor  # bool
    has_eos_B: Tensor  # bool
    logprobs_BT: Tensor  # float32, of the policy as it was when the rollout was made
    ref_logprobs_BT: Tensor  # float32
    entropy_BT: Tensor  # float32, nats
    values_BT: Tensor  # float32
    scores_B: Tensor  # float32, the reward model's own


@dataclass(frozen=True)
class Rollout:
    micro_batches: tuple[MicroBatch, ...]
    sampler_gap_max: float  # largest |sampler's logprob − trainer's|, nats
    sampler_gap_mean: float


def prompt_indices(seed: int, update: int, *, num_episodes: int, num_prompts: int) -> list[int]:
    """Which prompts this update's episodes answer: epoch after epoch through keyed shuffles of all prompts."""
    indices = []
    shuffles: dict[int, list[int]] = {}
    for number in range(update * num_episodes, (update + 1) * num_episodes):
        epoch, place = divmod(number, num_prompts)
        if epoch not in shuffles:
            shuffles[epoch] = permutation(seed, "prompts", epoch, size=num_prompts)
        indices.append(shuffles[epoch][place])
    return indices


def generate_episodes(
    model: AdaptedModel,
    codec: Codec,
    prompts: list[tuple[int, ...]],
    *,
    sampling: Sampling,
    seed: int,
    update: int,
) -> list[Episode]:
    """One response of the policy to each prompt."""
    numbers = list(range(update * len(prompts), (update + 1) * len(prompts)))
    uniforms_BT = keyed_uniforms(seed, "sample", update, numbers, sampling.max_response_length)
    with model.role(POLICY):
        responses = generate(model, codec, prompts, sampling=sampling, uniforms_BT=uniforms_BT)
    return [Episode(p, r.ids, r.has_eos, r.logprobs) for p, r in zip(prompts, responses, strict=True)]


@torch.no_grad()
def look(
    model: AdaptedModel,
    episodes: list[Episode],
    heads: Heads,
    *,
    micro_batch_size: int,
    temperature: float,
    pad_id: int,
) -> Rollout:
    """Compose the micro-batches and let policy, reference, reward and value each look at them."""
    lengths = [len(e.prompt_ids) + len(e.response_ids) for e in episodes]
    micro_batches: list[MicroBatch] = []
    gaps: list[Tensor] = []
    for group in length_sorted_batches(lengths, micro_batch_size):
        chosen = [episodes[i] for i in group]
        batch = collate(chosen, pad_id=pad_id, device=model.device)
        with model.role(POLICY):
            policy = policy_pass(
                model,
                batch,
                temperature=temperature,
                value_head=None if heads.critic_is_adapter else heads.value,
                with_entropy=True,
            )
        with model.role(REFERENCE):
            reference = policy_pass(model, batch, temperature=temperature)
        with model.role(REWARD):
            scores_B = score_pass(model, heads.reward, batch)
        values_BT = policy.values_BT
        if heads.critic_is_adapter:
            with model.role(VALUE):
                values_BT = value_pass(model, heads.value, batch)
        assert policy.entropy_BT is not None
        assert values_BT is not None
        micro_batches.append(
            MicroBatch(
                batch=batch,
                is_response_BT=batch.is_response_BT,
                has_eos_B=torch.tensor([e.has_eos for e in chosen], device=model.device),
                logprobs_BT=policy.logprobs_BT,
                ref_logprobs_BT=reference.logprobs_BT,
                entropy_BT=policy.entropy_BT,
                values_BT=values_BT,
                scores_B=scores_B,
            )
        )
        sampled = torch.tensor([x for e in chosen for x in e.sampler_logprobs], device=model.device)
        gaps.append((policy.logprobs_BT[batch.is_response_BT] - sampled).abs())
    gap = torch.cat(gaps)
    return Rollout(tuple(micro_batches), gap.max().item(), gap.mean().item())
