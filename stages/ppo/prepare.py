"""Everything that PPO needs before its first update: rows, reward sources, actor and critic, shaper, learner, guard."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from align.adapters import AdaptedModel
from align.config import PPOConfig
from align.context import PPOInputs, Sampling, StageContext
from align.rewards import AS_IT_IS, RewardModel, RewardSources, load_reward_models, reward_sources
from align.sampler import Sampler
from data.records import Account
from data.tokenization import Codec, TokenizedPrompt, encode_demonstrations, encode_prompts
from stages.ppo.actor_critic import ActorCritic
from stages.ppo.guard import Guard, HeldOut
from stages.ppo.learn import Learner, Texts
from stages.ppo.rollout import REFERENCE
from stages.ppo.shaping import Shaper

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rows:
    """What PPO reads, tokenized."""

    prompts: list[TokenizedPrompt]
    held_out: list[TokenizedPrompt]
    ptx: Texts | None
    account: Account


@dataclass(frozen=True)
class Parts:
    rows: Rows
    sampler: Sampler
    sources: RewardSources
    actor_critic: ActorCritic
    shaper: Shaper
    learner: Learner
    guard: Guard
    frozen: Mapping[str, str]  # the checksums of the adapters that no update may change


def prepare(config: PPOConfig, inputs: PPOInputs, context: StageContext) -> Parts:
    """Tokenize, load the frozen roles, and add what is trained."""
    model = context.model
    codec = model.base.codec(context.system_prompt)
    sampling = context.fitting_sampling(Sampling.of(config.rollout))
    rows = tokenize(config, inputs, codec, context, max_prompt_length=sampling.max_prompt_length)
    context.load_sft(inputs.sft)
    members = load_reward_models(model, inputs.reward_models)
    sources = reward_sources(config.rewards, members, model, codec)
    actor_critic = _make_actor_critic(config, members, model)
    micro_batch_size = context.part_of(config.loss.micro_batch_size)
    _warn_of_truncation(config)
    sampler = Sampler(model, codec, sampling, context.seed)
    return Parts(
        rows=rows,
        sampler=sampler,
        sources=sources,
        actor_critic=actor_critic,
        shaper=Shaper(config.rewards, config.kl, sources, max_response_length=sampling.max_response_length),
        learner=Learner(actor_critic, model, config, seed=context.seed, split=context.split, texts=rows.ptx),
        guard=Guard(config.guard, HeldOut(rows.held_out, sampler, sources, micro_batch_size)),
        frozen={name: model.checksum(name) for name in (REFERENCE, *(member.adapter for member in members))},
    )


def tokenize(
    config: PPOConfig, inputs: PPOInputs, codec: Codec, context: StageContext, *, max_prompt_length: int
) -> Rows:
    on_progress = context.progress("tokenizing")
    prompts, rejects = encode_prompts(
        codec, inputs.prompts, max_prompt_length=max_prompt_length, on_progress=on_progress
    )
    account = context.set_aside("prompts", len(inputs.prompts), rejects)
    held_out: list[TokenizedPrompt] = []
    if config.guard.every is not None:
        chosen = inputs.held_out[-config.guard.prompts :]
        held_out, rejects = encode_prompts(codec, chosen, max_prompt_length=max_prompt_length)
        account += context.set_aside("held_out", len(chosen), rejects)
    ptx = None
    if config.loss.ptx_coefficient:
        length = context.fitting_length("ppo.loss.ptx_max_length", config.loss.ptx_max_length)
        texts, rejects = encode_demonstrations(codec, inputs.ptx, max_length=length, on_progress=on_progress)
        cuts, limit = [text.num_cut for text in texts], f"ppo.loss.ptx_max_length {length}"
        account += context.set_aside("ptx", len(inputs.ptx), rejects, cuts=cuts, limit=limit)
        ptx = Texts(texts, codec.pad_id)
    return Rows(prompts, held_out, ptx, account)


def _make_actor_critic(config: PPOConfig, members: Sequence[RewardModel], model: AdaptedModel) -> ActorCritic:
    if config.advantage.estimator != "gae":
        return ActorCritic(model, None, config.optimizer)
    start = None
    if config.critic.kind == "adapter" and config.rewards.uses_reward_model:
        weight = next(source.weight for source in config.rewards.sources if source.kind == "reward")
        first, is_standardized = members[0], config.rewards.normalize == "model" or len(members) > 1
        scale = first.scale if is_standardized else AS_IT_IS
        # V starts as weight · (score − mean)/std
        start = (first, replace(scale, std=scale.std / weight) if weight else scale)
    return ActorCritic(model, config.critic, config.optimizer, start=start)


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
