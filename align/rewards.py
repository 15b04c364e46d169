"""What scores an episode: reward models on the resident base, classifiers and functions, weighted and summed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from align.adapters import AdaptedModel
from align.config import RewardsConfig, RewardSourceConfig
from align.context import RewardModelArtifacts, member_suffixes
from align.episodes import Episode, EpisodeBatch, collate, policy_pass, score_pass
from align.errors import ArtifactError
from align.heads import ScalarHead, ScoreStatistics, load_head
from align.sampler import Sampler
from align.scorers import Classifier, RewardFunction
from data.batching import prompt_sorted_batches
from data.tokenization import Codec, decode_response

REWARD = "reward"
AS_IT_IS = ScoreStatistics(0.0, 1.0, 0)
Score = Callable[[EpisodeBatch, Sequence[Episode]], Tensor]  # -> (B,) float32


@dataclass(frozen=True)
class RewardModel:
    """A frozen adapter on the resident base, its head, and the scale of its score."""

    adapter: str
    head: ScalarHead
    scale: ScoreStatistics


@dataclass(frozen=True)
class Source:
    """`scale` is what its score is standardised by before it is weighted."""

    name: str
    weight: float
    score: Score
    scale: ScoreStatistics = AS_IT_IS


@dataclass(frozen=True)
class RewardSources:
    sources: tuple[Source, ...]

    @torch.no_grad()
    def score(self, batch: EpisodeBatch, episodes: Sequence[Episode]) -> dict[str, Tensor]:
        """Each source's own score (B,) by name."""
        return {source.name: source.score(batch, episodes) for source in self.sources}

    def total(self, by_name: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum of the scores as they are: (B,)."""
        return torch.stack([source.weight * by_name[source.name] for source in self.sources]).sum(0)

    def standardized(self, by_name: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum, each source first by its own scale: (B,)."""
        terms = [s.weight * ((by_name[s.name] - s.scale.mean) / s.scale.std) for s in self.sources]
        return torch.stack(terms).sum(0)


def combine(scores_KB: Tensor, *, how: str, penalty: float) -> Tensor:
    """One score from an ensemble's K: (B,).

    "mean", "min" (worst case), or "mean-std": mean − penalty · standard deviation (uncertainty-weighted). Coste et
    al. 2023 (Reward Model Ensembles Help Mitigate Overoptimization), eqs. 3 to 5; they subtract the variance, which
    is not in the score's units, so here it is the (population) standard deviation.
    """
    assert scores_KB.dim() == 2, scores_KB.shape
    if how == "min":
        return scores_KB.amin(0)
    mean_B = scores_KB.mean(0)
    return mean_B if how == "mean" else mean_B - penalty * scores_KB.std(0, unbiased=False)


@torch.no_grad()
def judge(
    sampler: Sampler,
    episodes: Sequence[Episode],
    sources: RewardSources,
    *,
    role: str,
    reference: str,
    batch_size: int,
) -> tuple[dict[str, Tensor], Tensor]:
    """What each source says of episodes that `sampler` drew of `role`, by name, and their k1 to `reference` in nats a
    response: (N,) on the CPU, in the order given."""
    model, temperature = sampler.model, sampler.sampling.temperature
    by_name = {source.name: torch.zeros(len(episodes)) for source in sources.sources}
    kls_N = torch.zeros(len(episodes))
    for group in prompt_sorted_batches([(e.prompt_ids, e.response_ids) for e in episodes], batch_size):
        chosen = [episodes[i] for i in group]
        batch = collate(chosen, pad_id=sampler.codec.pad_id, device=model.device)
        if role != reference:  # or it is 0
            with model.role(role):
                own_BT = policy_pass(model, batch, temperature=temperature).logprobs_BT
            with model.role(reference):
                ref_BT = policy_pass(model, batch, temperature=temperature).logprobs_BT
            kls_N[group] = (own_BT - ref_BT).sum(-1).cpu()
        for name, scores_B in sources.score(batch, chosen).items():
            by_name[name][group] = scores_B.cpu()
    return by_name, kls_N


def load_reward_models(model: AdaptedModel, artifacts: Sequence[RewardModelArtifacts]) -> tuple[RewardModel, ...]:
    """Load each member's adapter, frozen: `reward`, or `reward-1` ... of an ensemble.

    Raises:
        ArtifactError: a head is damaged, of another width, or without its statistics.
    """
    members = []
    for suffix, own in zip(member_suffixes(len(artifacts)), artifacts, strict=True):
        name = f"{REWARD}{suffix}"
        model.load(name, own.adapter.path)
        head, scale = load_head(own.head.path, device=model.device)
        if head.weight.shape[1] != model.hidden_size:
            raise ArtifactError(
                f"{own.head.path} is a head for hidden size {head.weight.shape[1]}, this base has "
                f"{model.hidden_size}; use the base that the reward model was trained on"
            )
        if scale is None:
            raise ArtifactError(
                f"{own.head.path} holds no statistics.json (the score's mean and std on SFT samples): train the reward "
                "stage here, or set ppo.rewards.normalize=none and write one with mean 0 and std 1"
            )
        members.append(RewardModel(name, head, scale))
    return tuple(members)


def reward_sources(
    config: RewardsConfig, members: tuple[RewardModel, ...], model: AdaptedModel, codec: Codec
) -> RewardSources:
    """Make every source of the config ready. Raises ConfigError or ModelError for one that cannot be."""

    def outside(scorer: Classifier | RewardFunction) -> Score:
        def score(batch: EpisodeBatch, episodes: Sequence[Episode]) -> Tensor:
            responses = [decode_response(codec, e.response_ids) for e in episodes]
            return scorer([e.prompt_text for e in episodes], responses).to(model.device)

        return score

    def source(own: RewardSourceConfig) -> Source:
        name, weight = own.label_in_logs, own.weight
        if own.kind == "reward":
            scale = members[0].scale if len(members) == 1 and config.normalize == "model" else AS_IT_IS
            return Source(name, weight, _members_score(config, members, model), scale)
        if own.kind == "classifier":
            assert own.model is not None
            sees_prompt = own.sees == "both"
            classifier = Classifier(
                own.model, revision=own.revision, label=own.label, sees_prompt=sees_prompt, device=model.device
            )
            return Source(name, weight, outside(classifier))
        assert own.function is not None
        return Source(name, weight, outside(RewardFunction(own.function, timeout_seconds=own.timeout_seconds)))

    return RewardSources(tuple(source(own) for own in config.sources))


def _members_score(config: RewardsConfig, members: tuple[RewardModel, ...], model: AdaptedModel) -> Score:
    """One reward model's score as it is; of an ensemble the members are standardised first, or the one with the
    widest scale would speak for all."""

    def score(batch: EpisodeBatch, episodes: Sequence[Episode]) -> Tensor:
        scores = []
        for member in members:
            with model.role(member.adapter):
                own_B = score_pass(model, member.head, batch)
            scores.append(own_B if len(members) == 1 else (own_B - member.scale.mean) / member.scale.std)
        return combine(torch.stack(scores), how=config.ensemble, penalty=config.ensemble_penalty)

    return score
