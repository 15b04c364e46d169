"""PPO on the resident base. `run_ppo` is the loop: roll out, score, shape, advantages, update, log, checkpoint."""

import logging
import time
from collections.abc import Sequence
from functools import partial
from itertools import pairwise

from align.adapters import AdaptedModel
from align.checkpoints import Groups, StageCheckpoints
from align.config import PPOConfig
from align.context import PPOInputs, StageContext, StageResult
from align.errors import InvariantError
from stages.ppo.actor_critic import ActorCritic
from stages.ppo.guard import Guard
from stages.ppo.learn import Lesson, estimate, ratio_tolerance
from stages.ppo.metrics import describe
from stages.ppo.prepare import make_ready
from stages.ppo.rollout import Rollout, draw_prompts, generate_episodes, look
from stages.ppo.shaping import Shaper

_log = logging.getLogger(__name__)


def run_ppo(config: PPOConfig, inputs: PPOInputs, context: StageContext) -> StageResult:
    """Train a policy adapter against the reward sources with PPO (Schulman et al. 2017; Ziegler et al. 2019).

    Raises:
        ArtifactError: a reward head is damaged, of another width, or without its statistics.
        ConfigError, ModelError: a reward source cannot be made ready.
        DataError: too many prompts or texts do not fit, or none does.
        RewardFunctionError: a reward function failed.
        InvariantError: a run-time invariant does not hold.
    """
    model, tracker = context.model, context.tracker
    parts = make_ready(config, inputs, context)
    actor_critic, shaper, guard = parts.actor_critic, parts.shaper, parts.guard
    checkpoints = StageCheckpoints(config.checkpoints, context)
    first_update, kept = _resume(checkpoints, actor_critic, shaper, guard)
    frozen = {name: model.checksum(name) for name in parts.frozen}
    if config.guard.every is not None and not guard.best:  # or the guard was allowed on the way
        tracker.log(first_update, guard.look(actor_critic, model, update=first_update))

    state = partial(_state, actor_critic, shaper, guard, kept)
    reason, step = None, first_update
    for update in range(first_update, config.updates):
        stop_if_asked = partial(checkpoints.stop_if_asked, update, state)  # until something moves, in the update
        clock = [time.perf_counter()]
        rate = actor_critic.set_learning_rate(update, config.updates)
        tracker.progress(update, config.updates, f"update {update + 1}")

        # Roll out
        responses = config.rollout.responses_per_prompt
        prompts = draw_prompts(parts.rows.prompts, config.rollout.episodes // responses, context.seed, update)
        episodes = generate_episodes(
            model,
            parts.codec,
            prompts,
            sampling=parts.sampling,
            seed=context.seed,
            update=update,
            responses_per_prompt=responses,
            on_step=stop_if_asked,
        )
        clock.append(time.perf_counter())

        # Score: policy, reference, reward sources and critic look at the same micro-batches
        rollout = look(
            model,
            episodes,
            parts.sources,
            actor_critic.critic,
            micro_batch_size=context.part_of(config.loss.micro_batch_size),
            temperature=parts.sampling.temperature,
            pad_id=parts.codec.pad_id,
            on_step=stop_if_asked,
        )
        clock.append(time.perf_counter())
        if update == 0:
            kept["first_step_kl"] = _verify_policy_is_reference(rollout, model)

        # Shape and estimate advantages
        shaped = shaper.shape(rollout)
        advantages, returns = estimate(rollout, shaped.rewards, config.advantage)
        lesson = Lesson(rollout, advantages, returns, shaper.kl_coefficient)

        # Update
        learnt = parts.learner.learn(lesson, update=update)
        kept.setdefault("first_minibatch_ratio_error", learnt["policy/first_ratio_error"])
        _verify_frozen(model, frozen)
        clock.append(time.perf_counter())

        # Log, adapt the KL coefficient, look at held-out prompts, checkpoint
        step = update + 1
        metrics = describe(lesson, shaped, parts.sources, has_critic=actor_critic.critic is not None)
        shaper.adapt(metrics["objective/kl"], num_episodes=len(episodes))
        looked = guard.look(actor_critic, model, update=step) if guard.is_due(step) else {}
        tracker.log(
            step, {"episode": step * len(episodes), **metrics, **learnt, "optimizer/learning_rate": rate, **looked}
        )
        seconds = _seconds([*clock, time.perf_counter()])
        tracker.log_timing(step, {**seconds, "seconds/checkpoint": checkpoints.seconds})  # of the update before
        # Or they, and what the layers below all adapters said of them, would still be there in the next update
        del rollout, shaped, advantages, returns, lesson
        reason = guard.reason_to_stop(metrics["objective/kl"])
        if reason is not None:
            break
        quality = looked.get("guard/score")
        if step < config.updates and checkpoints.is_due(step, quality):
            checkpoints.save(step, *state(), quality)

    kept_update = step
    if reason is not None:
        kept_update = guard.put_best_back(actor_critic)
        _log.warning("stopped after update %d: %s; kept: the policy after update %d", step, reason, kept_update)
    tracker.progress(config.updates, config.updates, "done")
    artifacts = actor_critic.save(context.folder, step=kept_update)
    ending = {"updates": step, "stopped": reason, "kept_update": kept_update}
    return StageResult("ppo", artifacts, {**kept, **ending}, parts.rows.account)


def _seconds(clock: Sequence[float]) -> dict[str, float]:
    names = ("seconds/generate", "seconds/score", "seconds/learn", "seconds/rest")
    return {name: after - before for name, (before, after) in zip(names, pairwise(clock), strict=True)}


def _state(
    actor_critic: ActorCritic, shaper: Shaper, guard: Guard, kept: dict[str, float]
) -> tuple[Groups, dict[str, object]]:
    """What a bit-exact continuation needs; all randomness and the learning rate are functions of the update."""
    groups = actor_critic.checkpoint_groups()
    state: dict[str, object] = {"verified": kept, "shaper": shaper.state()}
    if guard.best:
        groups, state = {**groups, "best": guard.best}, {**state, "guard": guard.state()}
    return groups, state


def _resume(
    checkpoints: StageCheckpoints, actor_critic: ActorCritic, shaper: Shaper, guard: Guard
) -> tuple[int, dict[str, float]]:
    """The update to begin with, and the first update's verified numbers."""
    checkpoint = checkpoints.resume()
    if checkpoint is None:
        return 0, {}
    actor_critic.restore(checkpoint)
    state = checkpoint.state
    shaper.restore(_numbers(state["shaper"]))
    if "guard" in state:
        guard.restore(_numbers(state["guard"]), checkpoint.groups["best"])
    return checkpoint.step, _numbers(state["verified"])


def _numbers(section: object) -> dict[str, float]:
    assert isinstance(section, dict)
    return {str(key): float(value) for key, value in section.items()}


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
