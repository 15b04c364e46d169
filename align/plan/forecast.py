"""What a run will take: bytes by role and by phase, and FLOPs, from its config and its base's shape. Pure: no torch.

Every row is taken to be as long as the config lets it be; shorter rows need less. Adapters that the user brings are
taken to be as `adapters` says. Left out are classifiers among the reward sources, which are models of their own, and
what the stages before have left in a CPU's heap.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from align.config import Config, SupervisedConfig
from align.plan import flops, memory
from align.plan.flops import Rows
from align.plan.memory import FLOAT32, MOMENTS, Footprint
from align.plan.shape import ModelShape


@dataclass(frozen=True)
class Role:
    """What one role takes beside the base that all share."""

    name: str
    weights: int  # bytes: its adapter and its head; the base's own
    training: int = 0  # bytes: gradients and moments


@dataclass(frozen=True)
class Phase:
    """The fullest moment of one part of a stage, on one device."""

    stage: str
    name: str
    bytes: Footprint
    flops: int = 0  # of one update, or of one optimizer step


@dataclass(frozen=True)
class Plan:
    roles: tuple[Role, ...]  # of PPO, or of the last stage before
    phases: tuple[Phase, ...]

    @property
    def resident(self) -> int:
        """Bytes of the base, adapters and heads."""
        return sum(role.weights for role in self.roles)

    def peak(self, stage: str | None = None) -> int:
        """Bytes at the fullest moment: of the whole run, or of one stage and of loading."""
        return max(phase.bytes.total for phase in self.phases if stage is None or phase.stage in (stage, "load"))


def forecast(config: Config, shape: ModelShape, *, on_gpu: bool, gpus: int = 1) -> Plan:
    """Of one of `gpus` devices, each of which holds the base and takes its share of rows and episodes."""
    sizes = _Sizes(config, replace(shape, has_kernels=shape.has_kernels and not on_gpu), gpus, on_gpu)
    phases: list[Phase] = [] if on_gpu else [_load(sizes)]
    if "sft" in config.run.stages:
        phases.append(_supervised("sft", config.sft, sizes))
    if "reward" in config.run.stages:
        phases += [_supervised("reward", config.reward, sizes), _generate("reward", sizes)]
    if "ppo" in config.run.stages:
        phases += [_generate("ppo", sizes), _score(sizes), _learn(sizes), _generate("evaluation", sizes)]
    return Plan(tuple(_roles(sizes)), tuple(phases if on_gpu else map(_in_a_heap, phases)))


def _in_a_heap(phase: Phase) -> Phase:
    holes = int(memory.HEAP_HOLES * phase.bytes.activations)
    return replace(phase, bytes=replace(phase.bytes, host=phase.bytes.host + holes))


@dataclass(frozen=True)
class _Sizes:
    """The config in the terms of the formulas: bytes, tokens and counts of one device."""

    config: Config
    shape: ModelShape
    gpus: int
    on_gpu: bool

    @property
    def dtype_bytes(self) -> int:
        return {"float32": 4, "bfloat16": 2, "auto": self.shape.auto_bytes}[self.config.base.dtype]

    @property
    def rank(self) -> int:
        return self.config.adapters.rank

    @property
    def base(self) -> int:
        return self.shape.num_parameters * self.dtype_bytes

    @property
    def adapter(self) -> int:
        """Float32, whatever the base's dtype."""
        return self.shape.num_lora_parameters(self.rank) * FLOAT32

    @property
    def head(self) -> int:
        return self.shape.num_head_parameters * FLOAT32

    @property
    def reward_stage(self) -> int:
        """Bytes of adapters and heads there: of `sft` and of every member."""
        return self.adapter + self.config.reward.ensemble * (self.adapter + self.head)

    @property
    def members(self) -> int:
        """Reward models that PPO asks."""
        if not self.config.ppo.rewards.uses_reward_model:
            return 0
        return self.config.reward.ensemble if "reward" in self.config.run.stages else 1

    @property
    def critic(self) -> int:
        """Bytes of what the critic adds."""
        if self.config.ppo.advantage.estimator != "gae":
            return 0
        return self.head + (self.adapter if self.has_value_adapter else 0)

    @property
    def has_value_adapter(self) -> bool:
        return self.config.ppo.advantage.estimator == "gae" and self.config.ppo.critic.kind == "adapter"

    @property
    def trained(self) -> int:
        """Bytes of what PPO trains."""
        return self.adapter + self.critic

    @property
    def episodes(self) -> int:
        return -(-self.config.ppo.rollout.episodes // self.gpus)

    @property
    def length(self) -> int:
        """Tokens of the longest episode."""
        return self.config.ppo.rollout.max_prompt_length + self.config.ppo.rollout.max_response_length

    @property
    def resident(self) -> Footprint:
        """What stands whatever is done."""
        return Footprint(weights=self.base, host=0 if self.on_gpu else memory.PROCESS_BYTES)

    @property
    def in_ppo(self) -> Footprint:
        """From the second update on: with AdamW's moments."""
        adapters = self.adapter + self.members * (self.adapter + self.head) + self.trained
        return replace(self.resident, adapters=adapters, optimizer=MOMENTS * self.trained)


def _roles(sizes: _Sizes) -> Iterator[Role]:
    training, stages = 1 + MOMENTS, sizes.config.run.stages
    yield Role("base, shared by all", sizes.base)
    if stages == ("sft",):
        yield Role("sft: an adapter", sizes.adapter, training * sizes.adapter)
        return
    yield Role("reference: the sft adapter", sizes.adapter)
    if "ppo" in stages:
        yield Role("policy: an adapter", sizes.adapter, training * sizes.adapter)
    members = sizes.members if "ppo" in stages else sizes.config.reward.ensemble
    for number in range(members):
        suffix, weights = f" {number + 1}" if members > 1 else "", sizes.adapter + sizes.head
        is_trained = "ppo" not in stages and number == 0  # one at a time
        yield Role(f"reward{suffix}: an adapter and a head", weights, training * weights if is_trained else 0)
    if "ppo" in stages and sizes.critic:
        what = "an adapter and a head" if sizes.has_value_adapter else "a head on the policy's trunk"
        yield Role(f"value: {what}", sizes.critic, training * sizes.critic)


def _load(sizes: _Sizes) -> Phase:
    """On a CPU the files are mapped, and are the base itself if they have its dtype; else both stand for a moment."""
    stored = sizes.shape.num_parameters * sizes.shape.stored_bytes
    is_read_twice = sizes.shape.stored_bytes != sizes.dtype_bytes
    return Phase("load", "", replace(sizes.resident, weights=sizes.base + (stored if is_read_twice else 0)))


def _supervised(stage: str, config: SupervisedConfig, sizes: _Sizes) -> Phase:
    """TRL's trainer on rows of max_length: the base, `sft`, and in the reward stage every member's adapter and head, of
    which one at a time is trained."""
    shape, rank, is_reward = sizes.shape, sizes.rank, stage == "reward"
    sides = 2 if is_reward and sizes.config.reward.objective.kind != "unpaired" else 1
    trained = sizes.adapter + (sizes.head if is_reward else 0)
    tokens = sides * config.micro_batch_size * config.max_length
    activations = memory.training_activations(
        shape,
        tokens,
        rank=rank,
        dtype_bytes=sizes.dtype_bytes,
        dropout=sizes.config.adapters.dropout > 0,
        is_checkpointed=config.gradient_checkpointing,
    )
    rows = Rows(sides * -(-config.batch_size // sizes.gpus), config.max_length)
    forwards = 2 if config.gradient_checkpointing else 1
    work = forwards * flops.forward(shape, rows, rank=rank) + flops.backward(shape, rows, rank=rank)
    if not is_reward:
        work += 2 * flops.lm_head(shape, rows.tokens)
    return Phase(
        stage,
        "train",
        replace(
            sizes.resident,
            adapters=sizes.reward_stage if is_reward else sizes.adapter,
            gradients=trained,
            optimizer=MOMENTS * trained,
            activations=activations,
            logits=0 if is_reward else memory.logprob_logits(shape, tokens),
        ),
        work,
    )


def _generate(stage: str, sizes: _Sizes) -> Phase:
    """The entering prompts' pass over a cache of all slots, then a token at a time. The reward stage and the evaluation
    do the same with nothing to train beside it; the evaluation also looks at whole batches of answers."""
    rollout, shape, dtype_bytes = sizes.config.ppo.rollout, sizes.shape, sizes.dtype_bytes
    prompt, response = rollout.max_prompt_length, rollout.max_response_length
    slots, is_refilled, work, state = rollout.batch_size, True, 0, sizes.in_ppo
    if stage == "ppo":
        slots = min(slots, sizes.episodes)
        is_refilled = sizes.episodes > slots
        prompts = -(-sizes.episodes // rollout.responses_per_prompt)  # each goes in once
        work = flops.forward(shape, Rows(prompts, prompt), rank=sizes.rank)
        work += flops.decode(shape, rank=sizes.rank, sequences=sizes.episodes, prompt=prompt, response=response)
        work += flops.lm_head(shape, sizes.episodes * response)
    else:
        state = replace(state, optimizer=0, adapters=state.adapters - sizes.critic)
    tokens = min(slots * prompt, max(prompt, memory.ENTERING_TOKENS))
    if stage == "reward":
        state = replace(state, adapters=sizes.reward_stage)
    if stage == "evaluation":
        tokens = slots * sizes.length
    columns = 1 + prompt + response * (2 if is_refilled else 1)  # one before the first: see align.slots
    bytes_ = replace(
        state,
        activations=memory.forward_activations(shape, tokens, dtype_bytes=dtype_bytes),
        cache=memory.cache_bytes(shape, slots=slots, columns=columns, dtype_bytes=dtype_bytes),
        logits=memory.sampler_logits(shape, slots, dtype_bytes=dtype_bytes),
    )
    return Phase(stage, {"ppo": "generate", "reward": "answers"}.get(stage, ""), bytes_, work)


def _score(sizes: _Sizes) -> Phase:
    """Policy, reference, reward models and value adapter look at each micro-batch in turn."""
    config, shape, dtype_bytes = sizes.config.ppo, sizes.shape, sizes.dtype_bytes
    responses = config.loss.micro_batch_size * config.rollout.max_response_length
    rows = Rows(sizes.episodes, sizes.length)
    repeated = 1 + sizes.members + sizes.has_value_adapter
    work = flops.forward(shape, rows, rank=sizes.rank)
    work += repeated * flops.forward(shape, rows, rank=sizes.rank, from_frozen=True)
    work += 2 * flops.lm_head(shape, sizes.episodes * config.rollout.max_response_length)
    activations = memory.forward_activations(
        shape, config.loss.micro_batch_size * sizes.length, dtype_bytes=dtype_bytes
    ) + memory.said_below(shape, sizes.episodes * sizes.length, dtype_bytes=dtype_bytes)
    bytes_ = replace(sizes.in_ppo, activations=activations, logits=memory.logprob_logits(shape, responses))
    return Phase("ppo", "score", bytes_, work)


def _learn(sizes: _Sizes) -> Phase:
    """Epochs over the rollout, and over texts if there are any. A value adapter learns after the policy."""
    config, shape, dtype_bytes = sizes.config.ppo, sizes.shape, sizes.dtype_bytes
    loss, response = config.loss, config.rollout.max_response_length
    tokens = max(
        loss.micro_batch_size * sizes.length,
        min(loss.micro_batch_size, loss.ptx_batch_size) * loss.ptx_max_length if loss.ptx_coefficient else 0,
    )
    forwards = 2 if loss.gradient_checkpointing else 1
    rows = Rows(sizes.episodes, sizes.length)
    both_ways = forwards * flops.forward(shape, rows, rank=sizes.rank, from_frozen=True)
    both_ways += flops.backward(shape, rows, rank=sizes.rank)
    work = (1 + sizes.has_value_adapter) * both_ways + 2 * flops.lm_head(shape, sizes.episodes * response)
    if loss.ptx_coefficient:
        texts = Rows(loss.minibatches * loss.ptx_batch_size, loss.ptx_max_length)
        work += forwards * flops.forward(shape, texts, rank=sizes.rank)
        work += flops.backward(shape, texts, rank=sizes.rank) + 2 * flops.lm_head(shape, texts.tokens)
    plain = replace(shape, has_kernels=shape.has_kernels and not sizes.config.base.compile)
    activations = memory.training_activations(
        plain, tokens, rank=sizes.rank, dtype_bytes=dtype_bytes, is_checkpointed=loss.gradient_checkpointing
    ) + memory.said_below(shape, sizes.episodes * sizes.length, dtype_bytes=dtype_bytes)
    bytes_ = replace(
        sizes.in_ppo,
        gradients=sizes.trained,
        activations=activations,
        logits=memory.logprob_logits(shape, loss.micro_batch_size * response),
    )
    return Phase("ppo", "learn", bytes_, loss.epochs * work)
