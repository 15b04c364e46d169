"""What one update is described by, under the field's names."""

from collections.abc import Sequence

import torch
from torch import Tensor

from align.rewards import RewardSources
from stages.ppo import objective
from stages.ppo.learn import Experience
from stages.ppo.rollout import MicroBatch, Rollout
from stages.ppo.shaping import Shaped


def describe(
    rollout: Rollout, shaped: Shaped, experience: Sequence[Experience], sources: RewardSources, *, has_critic: bool
) -> dict[str, float]:
    """The rollout's metrics. objective/kl is k1 summed over a response, in nats; objective/score the weighted sum of
    the sources' own scores, objective/score_NAME each one of several."""
    mbs = rollout.micro_batches
    kl_B = torch.cat([objective.kl_k1(mb.logprobs_BT, mb.ref_logprobs_BT).sum(-1) for mb in mbs])
    k3_B = torch.cat([objective.kl_k3(mb.logprobs_BT, mb.ref_logprobs_BT).sum(-1) for mb in mbs])
    scores_B = torch.cat([sources.total(mb.scores) for mb in mbs])
    shaped_B = torch.cat(shaped.scores)
    lengths_B = torch.cat([mb.is_response_BT.sum(-1) for mb in mbs]).float()
    entropy_B = torch.cat([mb.entropy_BT.sum(-1) for mb in mbs])
    values = {
        "objective/kl": kl_B.mean(),
        "objective/kl_k3": k3_B.mean(),
        "objective/score": scores_B.mean(),
        "objective/score_std": scores_B.std(unbiased=False),
        "objective/shaped_score": shaped_B.mean(),
        "objective/rlhf_reward": shaped_B.mean() - shaped.kl_coefficient * kl_B.mean(),
        "policy/entropy": entropy_B.sum() / lengths_B.sum(),
        "rollout/response_length": lengths_B.mean(),
        "rollout/eos_rate": torch.cat([mb.has_eos_B for mb in mbs]).float().mean(),
        **(_of_sources(mbs, sources) if len(sources.sources) > 1 else {}),
        **(_of_critic(experience) if has_critic else {}),
    }
    return {name: value.item() for name, value in values.items()} | {
        "objective/kl_coefficient": shaped.kl_coefficient,
        "rollout/sampler_gap_max": rollout.sampler_gap_max,
        "rollout/sampler_gap_mean": rollout.sampler_gap_mean,
    }


def _of_sources(mbs: Sequence[MicroBatch], sources: RewardSources) -> dict[str, Tensor]:
    return {
        f"objective/score_{source.name}": torch.cat([mb.scores[source.name] for mb in mbs]).mean()
        for source in sources.sources
    }


def _of_critic(experience: Sequence[Experience]) -> dict[str, Tensor]:
    values_N = torch.cat([own.mb.values_BT[own.mb.is_response_BT] for own in experience])
    returns_N = torch.cat([own.returns_BT[own.mb.is_response_BT] for own in experience])
    return {
        "value/mean": values_N.mean(),
        "value/explained_variance": objective.explained_variance(values_N, returns_N),
    }
