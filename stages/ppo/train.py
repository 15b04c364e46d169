"""PPO on the resident base. `run_ppo` is the loop: roll out, score, shape, advantages, update, log, checkpoint."""

import logging
import time
from itertools import pairwise

import torch
from torch import Tensor

from align.adapters import AdaptedModel
from align.checkpoints import load_newest, save_checkpoint
from align.config import PPOConfig
from align.context import PPOInputs, Sampling, StageContext, StageResult
from align.errors import ArtifactError, InvariantError
from align.heads import ScalarHead, ScoreStatistics, load_head
from data.tokenization import encode_prompts
from stages.ppo import objective
from stages.ppo.actor_critic import ActorCritic
from stages.ppo.learn import Lesson, estimate, learn, ratio_tolerance
from stages.ppo.rollout import REFERENCE, REWARD, Heads, Rollout, generate_episodes, look, prompt_indices

_log = logging.getLogger(__name__)


def run_ppo(config: PPOConfig, inputs: PPOInputs, context: StageContext) -> StageResult:
    """Train a policy adapter against the reward model with PPO (Schulman et al. 2017; Ziegler et al. 2019).

    Raises:
        ArtifactError: the reward head is damaged, of another width, or without its statistics.
        DataError: too many prompts do not fit, or none does.
        InvariantError: a run-time invariant does not hold (see DESIGN).
    """
    model, tracker = context.model, context.tracker
    codec = model.base.codec(context.system_prompt)
    tokenized, rejects = encode_prompts(codec, inputs.prompts, max_prompt_length=config.rollout.max_prompt_length)
    account = context.set_aside("prompts", len(inputs.prompts), rejects)
    prompts = [prompt.ids for prompt in tokenized]
    reward_head, statistics = load_frozen_roles(inputs, model, seed=context.seed)
    scale = statistics if config.rewards.normalize else ScoreStatistics(0.0, 1.0, 0)
    learner = ActorCritic(model, reward_head, scale, config.critic, config.optimizer)
    heads = Heads(reward_head, learner.value_head, learner.critic_is_adapter)
    first_update, kept = _resume(learner, context)
    frozen = {name: model.checksum(name) for name in (REFERENCE, REWARD)}
    sampling = Sampling.of(config.rollout)
    beta = config.kl.coefficient
    _warn_of_truncation(config)

    for update in range(first_update, config.updates):
        clock = [time.perf_counter()]
        rate = learner.set_learning_rate(update, config.updates)
        tracker.progress(update, config.updates, f"update {update + 1}")

        # Roll out
        numbers = prompt_indices(context.seed, update, num_episodes=config.rollout.episodes, num_prompts=len(prompts))
        chosen = [prompts[i] for i in numbers]
        episodes = generate_episodes(model, codec, chosen, sampling=sampling, seed=context.seed, update=update)
        clock.append(time.perf_counter())

        # Score: the policy, the reference, the reward model and the critic look at the same micro-batches
        rollout = look(
            model,
            episodes,
            heads,
            micro_batch_size=config.loss.micro_batch_size,
            temperature=sampling.temperature,
            pad_id=codec.pad_id,
        )
        clock.append(time.perf_counter())
        if update == 0:
            kept["first_step_kl"] = _verify_policy_is_reference(rollout, model)

        # Shape and estimate advantages
        rewards, shaped = shape(rollout, scale, config)
        lesson = estimate(rollout, rewards, config)

        # Update
        learnt = learn(learner, lesson, config, model, seed=context.seed, update=update)
        kept.setdefault("first_minibatch_ratio_error", learnt["policy/first_ratio_error"])
        _verify_frozen(model, frozen)
        clock.append(time.perf_counter())

        # Log and checkpoint
        step = update + 1
        metrics = {**describe(rollout, lesson, shaped, beta), **learnt, "optimizer/learning_rate": rate}
        tracker.log(step, {"episode": step * len(episodes), **metrics})
        seconds = [after - before for before, after in pairwise(clock)]
        tracker.log_timing(
            step, dict(zip(("seconds/generate", "seconds/score", "seconds/learn"), seconds, strict=True))
        )
        if step % config.checkpoint_every == 0 and step < config.updates:
            save_checkpoint(
                context.folder / "checkpoints",
                learner.checkpoint(step, dict(kept)),
                stage="ppo",
                base_identity=model.base_identity,
                keep=config.keep_checkpoints,
            )

    tracker.progress(config.updates, config.updates, "done")
    artifacts = learner.save(context.folder, step=config.updates)
    return StageResult("ppo", artifacts, {**kept, "updates": config.updates}, account)


def _warn_of_truncation(config: PPOConfig) -> None:
    rollout = config.rollout
    on = [
        name
        for name, off in (("top_k", 0), ("top_p", 1.0), ("min_response_length", 0))
        if getattr(rollout, name) != off
    ]
    if on:
        _log.warning(
            "ppo.rollout: %s: samples leave the distribution that logprobs and KL are taken of, so both are biased",
            ", ".join(on),
        )


def load_frozen_roles(inputs: PPOInputs, model: AdaptedModel, *, seed: int) -> tuple[ScalarHead, ScoreStatistics]:
    """Load the reference and the reward model; returns its head and its score's scale."""
    if inputs.sft is None:
        model.add(REFERENCE, seed=seed)  # zero: the reference is then the base itself, by the same code path
    else:
        model.load(REFERENCE, inputs.sft.path)
    model.load(REWARD, inputs.reward_adapter.path)
    head, statistics = load_head(inputs.reward_head.path, device=model.device)
    if head.weight.shape[1] != model.hidden_size:
        raise ArtifactError(
            f"{inputs.reward_head.path} is a head for hidden size {head.weight.shape[1]}, this base has "
            f"{model.hidden_size}; use the base that the reward model was trained on"
        )
    if statistics is None:
        raise ArtifactError(
            f"{inputs.reward_head.path} holds no statistics.json (the score's mean and std on SFT samples): train the "
            "reward stage here, or set ppo.rewards.normalize=false and write one with mean 0 and std 1"
        )
    return head, statistics


def shape(rollout: Rollout, scale: ScoreStatistics, config: PPOConfig) -> tuple[list[Tensor], list[Tensor]]:
    """Per-token rewards (B, T) and shaped scores (B,) of each micro-batch."""
    rewards, shaped = [], []
    for mb in rollout.micro_batches:
        scores_B = objective.shaped_scores(
            mb.scores_B,
            mb.has_eos_B,
            mean=scale.mean,
            std=scale.std,
            clip=config.rewards.clip,
            missing_eos_penalty=config.rewards.missing_eos_penalty,
        )
        kl_BT = objective.kl_k1(mb.logprobs_BT, mb.ref_logprobs_BT)
        rewards.append(
            objective.token_rewards(scores_B, kl_BT, mb.is_response_BT, kl_coefficient=config.kl.coefficient)
        )
        shaped.append(scores_B)
    return rewards, shaped


def describe(rollout: Rollout, lesson: Lesson, shaped: list[Tensor], kl_coefficient: float) -> dict[str, float]:
    """The rollout's metrics, under the field's names. objective/kl is k1 summed over a response, in nats."""
    mbs = rollout.micro_batches
    kl_B = torch.cat([objective.kl_k1(mb.logprobs_BT, mb.ref_logprobs_BT).sum(-1) for mb in mbs])
    k3_B = torch.cat([objective.kl_k3(mb.logprobs_BT, mb.ref_logprobs_BT).sum(-1) for mb in mbs])
    scores_B = torch.cat([mb.scores_B for mb in mbs])
    shaped_B = torch.cat(shaped)
    lengths_B = torch.cat([mb.is_response_BT.sum(-1) for mb in mbs]).float()
    entropy_B = torch.cat([mb.entropy_BT.sum(-1) for mb in mbs])
    values_N = torch.cat([mb.values_BT[mb.is_response_BT] for mb in mbs])
    returns_N = torch.cat([r[mb.is_response_BT] for r, mb in zip(lesson.returns, mbs, strict=True)])
    values = {
        "objective/kl": kl_B.mean(),
        "objective/kl_k3": k3_B.mean(),
        "objective/score": scores_B.mean(),
        "objective/score_std": scores_B.std(unbiased=False),
        "objective/shaped_score": shaped_B.mean(),
        "objective/rlhf_reward": shaped_B.mean() - kl_coefficient * kl_B.mean(),
        "policy/entropy": entropy_B.sum() / lengths_B.sum(),
        "rollout/response_length": lengths_B.mean(),
        "rollout/eos_rate": torch.cat([mb.has_eos_B for mb in mbs]).float().mean(),
        "value/mean": values_N.mean(),
        "value/explained_variance": objective.explained_variance(values_N, returns_N),
    }
    gaps = {"rollout/sampler_gap_max": rollout.sampler_gap_max, "rollout/sampler_gap_mean": rollout.sampler_gap_mean}
    return {name: value.item() for name, value in values.items()} | gaps


def _resume(learner: ActorCritic, context: StageContext) -> tuple[int, dict[str, float]]:
    """The update to begin with, and the first update's verified numbers."""
    if not context.resume:
        return 0, {}
    checkpoint, notes = load_newest(context.folder / "checkpoints", base_identity=context.model.base_identity)
    for note in notes:
        _log.warning(note)
    if checkpoint is None:
        context.tracker.rewind(0)
        return 0, {}
    learner.restore(checkpoint)
    context.tracker.rewind(checkpoint.step)
    kept = {key: float(str(value)) for key, value in checkpoint.state.items() if key != "environment"}
    return checkpoint.step, kept


def _verify_policy_is_reference(rollout: Rollout, model: AdaptedModel) -> float:
    """Before the first update the policy is a copy of the reference; returns the largest difference in nats."""
    gap = max((mb.logprobs_BT - mb.ref_logprobs_BT).abs().max().item() for mb in rollout.micro_batches)
    if not gap <= ratio_tolerance(model):
        raise InvariantError(
            f"before the first update the policy differs from the reference: largest |logp − logp_ref| is {gap:.3g}, "
            f"allowed {ratio_tolerance(model):.0e}; the policy adapter is no copy of sft, or dropout is on"
        )
    return gap


def _verify_frozen(model: AdaptedModel, checksums: dict[str, str]) -> None:
    for name, before in checksums.items():
        after = model.checksum(name)
        if after != before:
            raise InvariantError(f"the frozen adapter {name} changed during the update: {before} → {after}")
