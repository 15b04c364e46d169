"""The phases of a PPO update, each as something to run again and again and the useful work that it does."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from align.adapters import AdaptedModel
from align.artifacts import read_artifact
from align.base import load_base
from align.config import BaseModelConfig, CriticConfig, OptimizerConfig, RewardsConfig
from align.context import RewardModelArtifacts, Sampling
from align.episodes import Episode, policy_pass
from align.generation import sample
from align.rewards import RewardSources, load_reward_models, reward_sources
from align.slots import Slots
from stages.ppo import objective
from stages.ppo.actor_critic import ActorCritic
from stages.ppo.rollout import POLICY, REFERENCE, Critic, MicroBatch, score
from tests.benchmarks.ppo_update_ours import adapters_of
from tests.benchmarks.ppo_update_task import BASE, HEAD, REWARD, SFT, Shape, Task
from tests.benchmarks.roofline_flops import Counted, Rows, decode_steps

PREFILL, DECODE, SCORE, LEARN = "prefill", "decode", "score", "learn"
_COMPILED = (DECODE, SCORE, LEARN)  # prompts enter by the plain layers, whatever base.compile says


@dataclass(frozen=True)
class Phase:
    """`prepare` is run before each `run`, and its time does not count."""

    name: str
    run: Callable[[], None]
    flops: int
    bytes_read: int | None = None  # of decoding, which has little to compute for what it reads
    prepare: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Roles:
    """The resident model with every role of the task, and who judges its episodes."""

    model: AdaptedModel
    actor_critic: ActorCritic
    sources: RewardSources

    @property
    def critic(self) -> Critic:
        assert self.actor_critic.critic is not None
        return self.actor_critic.critic


def load_roles(prepared: Path, task: Task, *, dtype: str, is_compiled: bool) -> Roles:
    base = BaseModelConfig.model_validate(
        {"model": str(prepared / BASE), "dtype": dtype, "device": "cpu", "compile": is_compiled}
    )
    model = AdaptedModel(load_base(base), adapters_of(task))
    model.load(REFERENCE, read_artifact(prepared / SFT).path)
    reward = RewardModelArtifacts(read_artifact(prepared / REWARD), read_artifact(prepared / HEAD))
    members = load_reward_models(model, (reward,))
    sources = reward_sources(RewardsConfig(), members, model, model.base.codec(None))
    return Roles(model, ActorCritic(model, CriticConfig(), OptimizerConfig()), sources)


def phases(roles: Roles, shape: Shape, task: Task) -> list[Phase]:
    """Of one layout: with compiled layers only those that call them."""
    made = [*_generation(roles, shape, task), _score(roles, shape, task), _learn(roles, shape, task)]
    return [phase for phase in made if phase.name in _COMPILED or not roles.model.base.is_compiled]


def _drawn(shape: Shape, task: Task, count: int) -> list[Episode]:
    generator = torch.Generator().manual_seed(0)
    size = (count, task.prompt_length + task.response_length)
    drawn: list[list[int]] = torch.randint(2, shape.vocabulary, size, generator=generator).tolist()
    nothing = (0.0,) * task.response_length
    length = task.prompt_length
    return [Episode(tuple(ids[:length]), tuple(ids[length:]), has_eos=False, sampler_logprobs=nothing) for ids in drawn]


class _Generation:
    """The rows of a rollout side by side, as `align.generation` decodes them when none can end early."""

    def __init__(self, roles: Roles, shape: Shape, task: Task) -> None:
        self._model, self._task = roles.model, task
        self._prompts = [episode.prompt_ids for episode in _drawn(shape, task, task.episodes)]
        self._sampling = Sampling(task.temperature, task.response_length, task.prompt_length, task.episodes)
        self._eos = torch.tensor(self._model.base.eos_ids)
        generator = torch.Generator().manual_seed(1)
        size = (task.response_length, task.episodes)
        self._uniforms_TB = torch.rand(size, generator=generator, dtype=torch.float64)

    @torch.no_grad()
    def prefill(self) -> None:
        self._slots = Slots(
            self._model,
            size=self._task.episodes,
            max_prompt=self._task.prompt_length,
            max_response=self._task.response_length,
            is_refilled=False,
        )
        with self._model.role(POLICY):
            self._tokens = self._sampled(self._slots.enter(self._prompts, pad_id=0), step=0)

    @torch.no_grad()
    def decode(self) -> None:
        with self._model.role(POLICY):
            for step in range(1, self._task.response_length):
                self._tokens = self._sampled(self._slots.advance(self._tokens), step=step)

    def _sampled(self, hidden_BH: torch.Tensor, *, step: int) -> list[int]:
        is_early_B = torch.zeros(len(hidden_BH), dtype=torch.bool)
        logits_BV = self._model.lm_head.logits(hidden_BH)
        uniforms_B = self._uniforms_TB[step]
        return sample(logits_BV, uniforms_B, self._sampling, eos=self._eos, is_early_B=is_early_B)[0].tolist()


def _generation(roles: Roles, shape: Shape, task: Task) -> list[Phase]:
    generation, counted, count = _Generation(roles, shape, task), Counted.of(shape, task.rank), task.episodes
    itemsize = roles.model.base.dtype.itemsize
    steps = decode_steps(count, task.prompt_length, task.response_length)
    return [
        Phase(PREFILL, generation.prefill, counted.forward(Rows(count, task.prompt_length), headed=count)),
        Phase(
            DECODE,
            generation.decode,
            sum(counted.forward(rows, headed=count) for rows in steps),
            sum(counted.step_bytes(rows, itemsize=itemsize) for rows in steps),
            prepare=generation.prefill,
        ),
    ]


def _score(roles: Roles, shape: Shape, task: Task) -> Phase:
    """One micro-batch through policy and value, the reference, and the reward model, which needs no LM head."""
    counted, rows = Counted.of(shape, task.rank), _rows(task)
    headed = task.micro_batch * task.response_length

    def run() -> None:
        _scored(roles, shape, task)

    return Phase(SCORE, run, 2 * counted.forward(rows, headed=headed) + counted.forward(rows, headed=0))


def _rows(task: Task) -> Rows:
    return Rows(task.micro_batch, task.prompt_length + task.response_length)


def _scored(roles: Roles, shape: Shape, task: Task) -> MicroBatch:
    rollout = score(
        roles.model,
        _drawn(shape, task, task.micro_batch),
        roles.sources,
        roles.critic,
        micro_batch_size=task.micro_batch,
        temperature=task.temperature,
        pad_id=0,
    )
    return rollout.micro_batches[0]


def _learn(roles: Roles, shape: Shape, task: Task) -> Phase:
    """Policy and value on one trunk, forward and backward, of one micro-batch; without the optimizer's step."""
    counted, rows = Counted.of(shape, task.rank), _rows(task)
    headed = task.micro_batch * task.response_length
    mb = _scored(roles, shape, task)
    advantages_BT = torch.randn(mb.logprobs_BT.shape, generator=torch.Generator().manual_seed(2))

    def run() -> None:
        head = roles.critic.head
        with roles.model.role(POLICY, train=True):
            out = policy_pass(roles.model, mb.batch, temperature=task.temperature, value_head=head)
            assert out.values_BT is not None
            policy_BT = objective.policy_loss(
                out.logprobs_BT, mb.logprobs_BT, advantages_BT, clip_low=0.2, clip_high=0.2
            )
            value_BT = objective.value_loss(out.values_BT, mb.values_BT, mb.values_BT + advantages_BT, clip=0.2)
            (policy_BT + CriticConfig().coefficient * value_BT).mean().backward()

    def forget() -> None:
        roles.actor_critic.optimizer.zero_grad(set_to_none=True)

    flops = counted.forward(rows, headed=headed) + counted.backward(rows, headed=headed)
    return Phase(LEARN, run, flops, prepare=forget)
