"""A learner with one rollout of eight episodes to learn from, on a tiny model."""

from dataclasses import replace

import pytest
import torch

from align.adapters import AdaptedModel
from align.config import PPOConfig
from align.context import Sampling
from align.heads import ScoreStatistics
from align.rewards import RewardModel
from align.sampler import Sampler
from stages.ppo.actor_critic import ActorCritic
from stages.ppo.learn import Experience, Learner, Texts, estimate
from stages.ppo.rollout import score
from stages.ppo.shaping import Shaper
from tests.resident import with_adapters
from tests.stages.scenes import ppo_config, reward_model_of, sources_of, tokenized

PROMPTS = tokenized(*(tuple(range(20 + n, 22 + 2 * n)) for n in range(8)))
SCALE = ScoreStatistics(0.0, 1.0, 8)


def scene(
    kind: str = "head", dtype: str = "float32", **sections: object
) -> tuple[AdaptedModel, ActorCritic, list[Experience], PPOConfig]:
    """A learner with one rollout of eight episodes to learn from."""
    critic: dict[str, object] = {"kind": kind if kind != "none" else "head"}
    config = ppo_config(critic={**critic, **sections.pop("critic", {})}, **sections)  # type: ignore[dict-item]
    model = with_adapters("llama", "sft", "reward", dtype="bfloat16" if dtype == "bfloat16" else "float32")
    if dtype == "float64":  # no setting of ours: to tell rounding from a wrong formula
        model.base.model.double()
    own = reward_model_of(model, SCALE)
    actor_critic = ActorCritic(model, None if kind == "none" else config.critic, config.optimizer, start=(own, SCALE))
    if kind == "head" and actor_critic.critic is not None:
        actor_critic.critic.head.initialize(2)  # so that the value loss reaches the trunk
    return model, actor_critic, lesson_of(model, actor_critic, own, config), config


def lesson_of(model: AdaptedModel, actor_critic: ActorCritic, own: RewardModel, config: PPOConfig) -> list[Experience]:
    codec, sources = model.base.codec(None), sources_of(config, model, own)
    responses = config.rollout.responses_per_prompt
    episodes = [
        # cut to several lengths, so that micro-batches differ in how many tokens they hold
        replace(episode, response_ids=episode.response_ids[:length], sampler_logprobs=episode.sampler_logprobs[:length])
        for episode, length in zip(
            Sampler(model, codec, Sampling.of(config.rollout), seed=0).episodes(
                PROMPTS[: 8 // responses], role="policy", purpose="sample", each=responses
            ),
            (1, 6, 2, 5, 3, 3, 6, 1),
            strict=True,
        )
    ]
    rollout = score(
        model,
        episodes,
        sources,
        actor_critic.critic,
        micro_batch_size=config.loss.micro_batch_size,
        temperature=config.rollout.temperature,
        pad_id=codec.pad_id,
    )
    shaper = Shaper(config.rewards, config.kl, sources, max_response_length=6)
    return estimate(rollout, shaper.shape(rollout).rewards, config.advantage)


def learn(
    actor_critic: ActorCritic,
    lesson: list[Experience],
    config: PPOConfig,
    model: AdaptedModel,
    *,
    update: int = 0,
    texts: Texts | None = None,
) -> dict[str, float]:
    learner = Learner(actor_critic, model, config, seed=0, texts=texts)
    return learner.learn(lesson, update=update, kl_coefficient=config.kl.coefficient)


def gradients_of_one_minibatch(
    kind: str,
    micro_batch_size: int,
    monkeypatch: pytest.MonkeyPatch,
    *,
    dtype: str = "float32",
    texts: Texts | None = None,
    **sections: dict[str, object],
) -> torch.Tensor:
    """All gradients in one vector, when the whole rollout is one minibatch."""
    loss = {**sections.pop("loss", {}), "epochs": 1, "minibatches": 1, "micro_batch_size": micro_batch_size}
    model, learner, lesson, config = scene(kind, dtype, loss=loss, **sections)
    for tensor in model.tensors("policy").values():  # as in a later update: away from the reference
        tensor.data.add_(0.01)
    found: list[torch.Tensor] = []

    def record() -> float:
        found.append(torch.cat([t.grad.reshape(-1).double() for t in learner.names if t.grad is not None]))
        return 0.0

    monkeypatch.setattr(learner, "step", record)
    lesson = lesson_of(model, learner, reward_model_of(model, SCALE), config)
    learn(learner, lesson, config, model, texts=texts)
    return found[0]
