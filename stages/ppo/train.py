"""PPO on the resident base. `run_ppo` is the loop, `one_update` what it does: roll out, score, shape and estimate
advantages, learn. Then the loop logs, adapts the KL coefficient, looks at held-out prompts and checkpoints."""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from align.adapters import AdaptedModel
from align.checkpoints import Groups, StageCheckpoints
from align.config import PPOConfig
from align.context import PPOInputs, StageContext, StageResult
from align.errors import InvariantError
from align.randomness import drawn_indices
from stages.ppo.actor_critic import ActorCritic
from stages.ppo.guard import Guard
from stages.ppo.learn import estimate, ratio_tolerance
from stages.ppo.metrics import describe
from stages.ppo.prepare import Parts, prepare
from stages.ppo.rollout import POLICY, Rollout, score
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
    tracker = context.tracker
    parts = prepare(config, inputs, context)
    actor_critic, shaper, guard = parts.actor_critic, parts.shaper, parts.guard
    checkpoints = StageCheckpoints(config.checkpoints, context)
    first_update, kept = _resume(checkpoints, actor_critic, shaper, guard)
    if config.guard.every is not None and not guard.best:  # at the start, or where --resume switched the guard on
        tracker.log(first_update, guard.look(actor_critic, update=first_update))

    state = partial(_state, actor_critic, shaper, guard, kept)
    reason, step = None, first_update
    for update in range(first_update, config.updates):
        tracker.progress(update, config.updates, f"update {update + 1}")
        stop_if_asked = partial(checkpoints.stop_if_asked, update, state)
        done = one_update(config, parts, context, update, stop_if_asked=stop_if_asked)
        if update == 0:
            kept.update(done.verified)
        step, kl = update + 1, done.metrics["objective/kl"]
        shaper.adapt(kl, num_episodes=config.rollout.episodes)
        looked = guard.look(actor_critic, update=step) if guard.is_due(step) else {}
        tracker.log(step, {"episode": step * config.rollout.episodes, **done.metrics, **looked})
        done.laps.end("rest")
        tracker.log_timing(step, {**done.laps.seconds, "seconds/checkpoint": checkpoints.seconds})  # of the one before
        reason = guard.reason_to_stop(kl)
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
    artifacts = actor_critic.save(context, step=kept_update)
    ending = {"updates": step, "stopped": reason, "kept_update": kept_update}
    return StageResult("ppo", artifacts, {**kept, **ending}, parts.rows.account)


class Laps:
    """The seconds of what comes one after the other."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def end(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[f"seconds/{name}"], self._last = now - self._last, now


@dataclass(frozen=True)
class UpdateRecord:
    """`verified`: what the invariants of a first update were found to be."""

    metrics: dict[str, float]
    verified: dict[str, float]
    laps: Laps


def one_update(
    config: PPOConfig, parts: Parts, context: StageContext, update: int, *, stop_if_asked: Callable[[], None]
) -> UpdateRecord:
    """`stop_if_asked` is called until something moves: it may raise."""
    model, sampler, actor_critic = context.model, parts.sampler, parts.actor_critic
    rate = actor_critic.set_learning_rate(update, config.updates)
    laps, verified = Laps(), dict[str, float]()

    # Roll out
    prompts, each = parts.rows.prompts, config.rollout.responses_per_prompt
    drawn = drawn_indices(context.seed, "prompts", update, num_drawn=config.rollout.episodes // each, size=len(prompts))
    episodes = sampler.episodes(
        [prompts[i] for i in drawn],
        role=POLICY,
        purpose="sample",
        turn=update,
        each=each,
        on_progress=lambda done, total: stop_if_asked(),
    )
    laps.end("generate")

    # Score: policy, reference, reward sources and critic go over the same micro-batches
    rollout = score(
        model,
        episodes,
        parts.sources,
        actor_critic.critic,
        micro_batch_size=context.part_of(config.loss.micro_batch_size),
        temperature=sampler.sampling.temperature,
        pad_id=sampler.codec.pad_id,
        on_step=stop_if_asked,
    )
    laps.end("score")
    if update == 0:
        verified["first_step_kl"] = _verify_policy_is_reference(rollout, model)

    # Shape and estimate advantages
    shaped = parts.shaper.shape(rollout)
    experience = estimate(rollout, shaped.rewards, config.advantage)

    # Learn
    learnt = parts.learner.learn(experience, update=update, kl_coefficient=shaped.kl_coefficient)
    verified["first_minibatch_ratio_error"] = learnt["policy/first_ratio_error"]
    _verify_frozen(model, parts.frozen)
    laps.end("learn")
    described = describe(rollout, shaped, experience, parts.sources, has_critic=actor_critic.critic is not None)
    return UpdateRecord({**described, **learnt, "optimizer/learning_rate": rate}, verified, laps)


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


def _verify_frozen(model: AdaptedModel, checksums: Mapping[str, str]) -> None:
    for name, before in checksums.items():
        after = model.checksum(name)
        if after != before:
            raise InvariantError(f"the frozen adapter {name} changed during the update: {before} → {after}")
