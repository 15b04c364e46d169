import math
from dataclasses import replace

import pytest
import torch

from align.adapters import AdaptedModel
from align.config import PPOConfig
from align.context import Sampling
from align.errors import InvariantError
from align.heads import ScalarHead, ScoreStatistics
from stages.ppo.actor_critic import ActorCritic
from stages.ppo.learn import Lesson, estimate, learn
from stages.ppo.rollout import Heads, Rollout, generate_episodes, look
from stages.ppo.train import shape
from tests.resident import with_adapters
from tests.stages.scenes import nudge, ppo_config

PROMPTS = [tuple(range(20 + n, 22 + 2 * n)) for n in range(8)]
SCALE = ScoreStatistics(0.0, 1.0, 8)


def scene(
    kind: str = "head", dtype: str = "float32", **sections: object
) -> tuple[AdaptedModel, ActorCritic, Lesson, PPOConfig]:
    """A learner with one rollout of eight episodes to learn from."""
    config = ppo_config(critic={"kind": kind}, **sections)
    model = with_adapters("llama", "sft", "reward", dtype=dtype)
    reward_head = ScalarHead(model.hidden_size).initialize(1)
    learner = ActorCritic(model, reward_head, SCALE, config.critic, config.optimizer)
    if kind == "head":
        learner.value_head.initialize(2)  # so that the value loss reaches the trunk
    lesson = estimate(*rolled_out(model, learner, reward_head, config), config)
    return model, learner, lesson, config


def rolled_out(
    model: AdaptedModel, learner: ActorCritic, reward_head: ScalarHead, config: PPOConfig
) -> tuple[Rollout, list[torch.Tensor]]:
    codec = model.base.codec(None)
    episodes = [
        # cut to several lengths, so that micro-batches differ in how many tokens they hold
        replace(episode, response_ids=episode.response_ids[:length], sampler_logprobs=episode.sampler_logprobs[:length])
        for episode, length in zip(
            generate_episodes(model, codec, PROMPTS, sampling=Sampling.of(config.rollout), seed=0, update=0),
            (1, 6, 2, 5, 3, 3, 6, 1),
            strict=True,
        )
    ]
    rollout = look(
        model,
        episodes,
        Heads(reward_head, learner.value_head, learner.critic_is_adapter),
        micro_batch_size=config.loss.micro_batch_size,
        temperature=config.rollout.temperature,
        pad_id=codec.pad_id,
    )
    rewards, _ = shape(rollout, SCALE, config)
    return rollout, rewards


def state_of(learner: ActorCritic) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for tensor, name in learner.names.items()}


def gradients_of_one_minibatch(kind: str, micro_batch_size: int, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """All gradients in one vector, when the whole rollout is one minibatch."""
    loss = {"epochs": 1, "minibatches": 1, "micro_batch_size": micro_batch_size}
    model, learner, lesson, config = scene(kind, loss=loss)
    found: list[torch.Tensor] = []

    def record() -> float:
        found.append(torch.cat([t.grad.reshape(-1).double() for t in learner.names if t.grad is not None]))
        return 0.0

    monkeypatch.setattr(learner, "step", record)
    learn(learner, lesson, config, model, seed=0, update=0)
    return found[0]


@pytest.mark.parametrize("kind", ["head", "adapter"])
def test_the_gradient_does_not_depend_on_the_micro_batch_size(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = gradients_of_one_minibatch(kind, 8, monkeypatch)
    assert whole.norm() > 1e-3
    for size in (1, 2, 4):
        cut = gradients_of_one_minibatch(kind, size, monkeypatch)
        # Float32 over other paddings: 5·10⁻⁶ was seen. Means over micro-batches instead of tokens are off by 0.4.
        assert ((cut - whole).norm() / whole.norm()).item() < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_first_ratio_is_1_exactly_and_everything_that_learns_moves(dtype: str) -> None:
    for kind in ("head", "adapter"):
        model, learner, lesson, config = scene(kind, dtype)
        frozen = {name: model.checksum(name) for name in ("sft", "reward")}
        before, base = state_of(learner), model.base_checksum()
        found = learn(learner, lesson, config, model, seed=0, update=0)
        assert found["policy/first_ratio_error"] == 0
        assert found["policy/stopped"] == 0
        assert all(not torch.equal(tensor, before[name]) for name, tensor in state_of(learner).items())
        assert frozen == {name: model.checksum(name) for name in ("sft", "reward")}
        assert base == model.base_checksum()


def test_learning_takes_epochs_times_minibatches_steps_over_whole_micro_batches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, learner, lesson, config = scene()
    seen: list[list[int]] = []
    plain = AdaptedModel.hidden

    def watched(self: AdaptedModel, ids_BS: torch.Tensor, is_token_BS: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            batches = [mb.batch.ids_BS for mb in lesson.rollout.micro_batches]
            seen[-1].append(next(i for i, own in enumerate(batches) if own is ids_BS))
        return plain(self, ids_BS, is_token_BS)

    step = learner.step

    def counted() -> float:
        seen.append([])
        return step()

    seen.append([])
    monkeypatch.setattr(AdaptedModel, "hidden", watched)
    monkeypatch.setattr(learner, "step", counted)
    learn(learner, lesson, config, model, seed=0, update=0)
    steps = seen[:-1]
    assert [len(step) for step in steps] == [2, 2, 2, 2]  # 2 epochs × 2 minibatches, of 2 micro-batches each
    assert sorted(steps[0] + steps[1]) == sorted(steps[2] + steps[3]) == [0, 1, 2, 3]


def test_target_kl_ends_the_update_after_the_step_that_passed_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, learner, lesson, config = scene(guard={"target_kl": 1e-12})
    steps: list[float] = []
    plain = learner.step
    monkeypatch.setattr(learner, "step", lambda: steps.append(plain()) or steps[-1])
    found = learn(learner, lesson, config, model, seed=0, update=0)
    # The first minibatch's ratio is 1, so its KL is 0; the second's is not
    assert len(steps) == 2
    assert found["policy/stopped"] == 1
    assert found["optimizer/gradient_norm"] == pytest.approx(sum(steps) / 2)
    model, learner, lesson, config = scene(guard={"target_kl": 1e6})
    assert learn(learner, lesson, config, model, seed=0, update=0)["policy/stopped"] == 0


def test_learning_lowers_the_clipped_objective_below_where_it_started() -> None:
    model, learner, lesson, config = scene(loss={"epochs": 8, "minibatches": 1}, optimizer={"learning_rate": 5e-3})
    found = learn(learner, lesson, config, model, seed=0, update=0)
    assert found["loss/policy"] < -0.01  # at ratio 1 it is −mean(whitened A) = 0
    assert found["policy/approxkl"] > 0


@pytest.mark.parametrize("name", ["policy", "head"])
def test_a_policy_changed_between_rollout_and_learning_is_noticed(name: str) -> None:
    model, learner, lesson, config = scene()
    if name == "head":  # a changed value head does not touch the ratio
        nudge(learner.value_head.weight)
        learn(learner, lesson, config, model, seed=0, update=0)
        return
    nudge(next(iter(model.tensors("policy").values())))
    with pytest.raises(
        InvariantError, match=r"first minibatch's ratio is not 1: largest .* is [0-9.e-]+, allowed 1e-05"
    ):
        learn(learner, lesson, config, model, seed=0, update=0)


@pytest.mark.parametrize("where", ["advantages", "returns"])
def test_a_loss_that_is_not_finite_stops_before_anything_changes(where: str) -> None:
    model, learner, lesson, config = scene()
    before = state_of(learner)
    for values_BT in getattr(lesson, where):
        values_BT[0, 0] = math.nan
    with pytest.raises(InvariantError, match=r"the loss is nan before the optimizer's step"):
        learn(learner, lesson, config, model, seed=0, update=0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state_of(learner).items())


def test_advantages_are_whitened_over_the_rollout_only_if_asked() -> None:
    for whiten in (True, False):
        _, _, lesson, _ = scene(advantage={"whiten": whiten})
        flat_N = torch.cat(
            [a[mb.is_response_BT] for a, mb in zip(lesson.advantages, lesson.rollout.micro_batches, strict=True)]
        )
        assert (abs(flat_N.mean().item()) < 1e-5 and abs(flat_N.std().item() - 1) < 0.05) == whiten
