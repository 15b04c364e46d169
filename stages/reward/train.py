"""Reward modelling: TRL's RewardTrainer trains each member's adapter and scalar head on the resident base."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from align.artifacts import Artifact
from align.config import RewardConfig
from align.context import RewardInputs, Sampling, StageContext, StageResult, member_suffixes
from align.episodes import Episode
from align.errors import DIVERGED, DataError, InvariantError
from align.heads import ScalarHead, ScoreStatistics, save_head
from align.randomness import stage_seed
from align.sampler import Sampler
from data.records import Account, Prompt, Reject
from data.tokenization import Codec, TokenizedPrompt, encode_comparisons, encode_prompts, encode_verdicts
from stages.reward.evidence import Evidence
from stages.reward.objective import ensemble_scores
from stages.reward.pairs import Pairs
from stages.reward.scorer import Member, score
from stages.reward.trainer import Members, Training
from stages.reward.verdicts import Verdicts

_log = logging.getLogger(__name__)
SFT = "sft"
REWARD = "reward"
_STATISTICS_PROMPTS = 128  # at most: the mean and spread of a score need no more


@dataclass(frozen=True)
class Measured:
    """A member, trained, and its scores."""

    member: Member
    training: Training
    held_out_N: Tensor  # of the evidence's held-out episodes, in their order
    answers_M: Tensor  # of the SFT answers
    statistics: ScoreStatistics  # of answers_M


def run_reward(config: RewardConfig, inputs: RewardInputs, context: StageContext) -> StageResult:
    """Train the `reward` adapter, which starts as a copy of `sft`, and its head on what people said of responses.

    With reward.ensemble k > 1 that is done k times, as `reward-1` to `reward-k`: heads and shuffles differ. The score's
    mean and spread on SFT responses to held-out prompts are saved with each head: PPO normalises by them.

    Raises:
        DataError: too many rows do not fit, or none does, or they say nothing of what is better.
        ArtifactError: an input is damaged or does not fit the base.
    """
    model, tracker = context.model, context.tracker
    codec = model.base.codec(context.system_prompt)
    evidence, account = tokenize(config, inputs, codec, context)
    sampling = context.fitting_sampling(inputs.sampling)
    prompts = statistics_prompts(inputs, codec, sampling)
    context.load_sft(inputs.sft)
    members = add_members(config, inputs, context)
    trained = Members(evidence, config, codec, context).train(members)

    answers = sample_answers(prompts, Sampler(model, codec, sampling, context.seed), context)
    measured: list[Measured] = []
    for member, training in zip(members, trained, strict=True):
        tracker.progress(len(measured), len(members), "scores")
        held_out_N, answers_M = (
            score(model, member, episodes, pad_id=codec.pad_id, batch_size=context.part_of(config.micro_batch_size))
            for episodes in (evidence.held_out_episodes(), answers)
        )
        if not (held_out_N.isfinite().all() and answers_M.isfinite().all()):
            raise InvariantError(f"reward: scores of {member.name} are not finite after its training; {DIVERGED}")
        measured.append(Measured(member, training, held_out_N, answers_M, statistics_of(answers_M)))
    tracker.progress(len(members), len(members), "scores")

    artifacts = tuple(artifact for one in measured for artifact in save_member(one, context))
    return StageResult("reward", artifacts, metrics_of(evidence, measured), account)


def tokenize(
    config: RewardConfig, inputs: RewardInputs, codec: Codec, context: StageContext
) -> tuple[Evidence, Account]:
    """The evidence of both sides, and an account of the rows that were set aside."""
    settings, max_length = config.objective, context.fitting_length("reward.max_length", config.max_length)
    is_unpaired = settings.kind == "unpaired"
    encode: Callable[..., tuple[list[Any], list[Reject]]] = encode_verdicts if is_unpaired else encode_comparisons
    rows: dict[str, list[Any]] = {}
    accounts: list[Account] = []
    for side, records in (("train", inputs.train), ("held_out", inputs.held_out)):
        kept, rejects = encode(codec, records, max_length=max_length, on_progress=context.progress("tokenizing"))
        rows[side] = kept
        cuts, limit = [row.num_cut for row in kept], f"reward.max_length {max_length}"
        accounts.append(context.set_aside(side, len(records), rejects, cuts=cuts, limit=limit))
    evidence_of = Verdicts.of if is_unpaired else Pairs.of
    return evidence_of(rows["train"], rows["held_out"], settings), accounts[0] + accounts[1]


def add_members(config: RewardConfig, inputs: RewardInputs, context: StageContext) -> list[Member]:
    """Each member's adapter, a copy of `sft` or of the one that was brought, and its head as drawn by its seed."""
    model = context.model
    members: list[Member] = []
    for suffix in member_suffixes(config.ensemble):
        name = REWARD + suffix
        if inputs.adapter is None:
            model.add(name, copy_of=SFT)
        else:
            model.load(name, inputs.adapter.path)
        seed = stage_seed(context.seed, name) if suffix else context.seed
        head = ScalarHead(model.hidden_size).initialize(seed).to(model.device)
        members.append(Member(name, suffix, seed, head))
    return members


def statistics_prompts(inputs: RewardInputs, codec: Codec, sampling: Sampling) -> list[TokenizedPrompt]:
    """The held-out prompts, or the first 128 that fit. DataError if none does: told before hours of training."""
    distinct = {record.prompt: Prompt(record.prompt, record.source) for record in inputs.held_out}
    prompts, too_long = encode_prompts(codec, list(distinct.values()), max_prompt_length=sampling.max_prompt_length)
    if not prompts:
        raise DataError(
            f"data.reward: none of the {len(distinct)} held-out prompts fits ppo.rollout.max_prompt_length "
            f"{sampling.max_prompt_length}, so the score's mean and spread cannot be measured; raise it"
        )
    if too_long:
        _log.warning(
            "reward: the score's mean and spread are measured without %d of %d held-out prompts, which are over "
            "ppo.rollout.max_prompt_length %d",
            len(too_long),
            len(distinct),
            sampling.max_prompt_length,
        )
    return prompts[:_STATISTICS_PROMPTS]


def sample_answers(prompts: list[TokenizedPrompt], sampler: Sampler, context: StageContext) -> list[Episode]:
    """One SFT response to each prompt."""
    on_progress = context.progress("SFT answers")
    return sampler.episodes(prompts, role=SFT, purpose="statistics", on_progress=on_progress)


def statistics_of(scores_M: Tensor) -> ScoreStatistics:
    """Their mean and spread; for want of a spread 1, as `align.statistics` has it, or a score would be but a sign."""
    std = scores_M.std(unbiased=False).item() if len(scores_M) > 1 else 0.0
    if std < 1e-6:
        _log.warning(
            "reward: the scores of %d SFT answers have no spread, so the score keeps its own scale; give data.reward "
            "more held-out prompts",
            len(scores_M),
        )
        std = 1.0
    return ScoreStatistics(scores_M.mean().item(), std, len(scores_M))


def save_member(measured: Measured, context: StageContext) -> tuple[Artifact, Artifact]:
    """Its adapter, and its head with the score's statistics."""
    model, member, step = context.model, measured.member, measured.training.kept_step
    adapter = context.write(f"adapter{member.suffix}", "adapter", lambda path: model.save(member.name, path), step=step)
    head = context.write(
        f"head{member.suffix}", "head", lambda path: save_head(member.head, path, measured.statistics), step=step
    )
    return adapter, head


def metrics_of(evidence: Evidence, measured: list[Measured]) -> Mapping[str, object]:
    """Of the one member; or of the mean of several, each in units of its own spread, with each one's own beside."""
    if len(measured) == 1:
        return _own_metrics(evidence, measured[0])
    spread_K = torch.tensor([one.statistics.std for one in measured])
    held_out_N = ensemble_scores(torch.stack([one.held_out_N for one in measured]), spread_K)
    answers_M = ensemble_scores(torch.stack([one.answers_M for one in measured]), spread_K)
    kept = ("accuracy", "loss", "margin", "steps", "kept_step", "score_mean", "score_std")
    members = [_own_metrics(evidence, one) for one in measured]
    return {
        **evidence.report(held_out_N),
        "steps": sum(one.training.steps for one in measured),
        **_scale(statistics_of(answers_M)),
        "members": [{key: metrics[key] for key in kept} for metrics in members],
    }


def _own_metrics(evidence: Evidence, one: Measured) -> dict[str, object]:
    steps = {"steps": one.training.steps, "kept_step": one.training.kept_step}
    return {**evidence.report(one.held_out_N), **steps, **_scale(one.statistics)}


def _scale(statistics: ScoreStatistics) -> dict[str, object]:
    return {
        "score_mean": statistics.mean,
        "score_std": statistics.std,
        "score_responses": statistics.num_responses,
    }
