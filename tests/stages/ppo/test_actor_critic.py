from pathlib import Path

import pytest
import torch

from align.adapters import AdaptedModel
from align.checkpoints import Checkpoint, load_newest, save_checkpoint
from align.config import CriticConfig, OptimizerConfig
from align.errors import InvariantError
from align.heads import ScalarHead, ScoreStatistics, load_head
from align.rewards import RewardModel
from stages.ppo.actor_critic import ActorCritic
from tests.resident import SHAPES, resident, with_adapters
from tests.stages.scenes import context_of

STATISTICS = ScoreStatistics(0.5, 2.0, 8)
KINDS = ("head", "adapter")


def learner_of(model: AdaptedModel, kind: str = "head", **optimizer: object) -> ActorCritic:
    head = ScalarHead(model.hidden_size).initialize(1)
    head.bias.data.fill_(0.3)
    critic = CriticConfig.model_validate({"kind": kind, "learning_rate": 3e-2})
    start = (RewardModel("reward", head, STATISTICS), STATISTICS)
    own = OptimizerConfig.model_validate({"learning_rate": 1e-2, **optimizer})
    return ActorCritic(model, critic, own, start=start)


def value_head_of(learner: ActorCritic) -> ScalarHead:
    assert learner.critic is not None
    return learner.critic.head


def give_gradients(learner: ActorCritic, seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for tensor in learner.names:
        tensor.grad = scale * torch.randn(tensor.shape, generator=generator)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_trained_is_the_policy_and_the_critic_and_nothing_else(shape: str, kind: str) -> None:
    model = with_adapters(shape, "sft", "reward")
    learner = learner_of(model, kind)
    assert model.checksum("policy") == model.checksum("sft")
    trained = {id(tensor) for tensor in learner.names}
    expected = [*model.tensors("policy").values(), *value_head_of(learner).parameters()]
    if kind == "adapter":
        assert model.checksum("value") == model.checksum("reward")
        expected += model.tensors("value").values()
    assert trained == {id(tensor) for tensor in expected}
    in_optimizer = [id(p) for group in learner.optimizer.param_groups for p in group["params"]]
    assert sorted(in_optimizer) == sorted(trained)
    assert len(set(learner.names.values())) == len(learner.names)


def test_a_head_critic_starts_at_0_and_an_adapter_critic_at_the_normalised_score() -> None:
    hidden = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert not value_head_of(learner_of(with_adapters("llama", "sft", "reward")))(hidden).any()
        reward_head = ScalarHead(32).initialize(1)
        reward_head.bias.data.fill_(0.3)
        expected = (reward_head(hidden) - STATISTICS.mean) / STATISTICS.std
        learner = learner_of(with_adapters("llama", "sft", "reward"), "adapter")
        torch.testing.assert_close(value_head_of(learner)(hidden), expected)


def test_policy_and_critic_have_rates_of_their_own_on_one_schedule() -> None:
    learner = learner_of(with_adapters("llama", "sft", "reward"), schedule="linear")
    assert learner.set_learning_rate(0, 4) == pytest.approx(1e-2)
    assert learner.set_learning_rate(3, 4) == pytest.approx(0.25e-2)
    assert [group["lr"] for group in learner.optimizer.param_groups] == pytest.approx([0.25e-2, 0.75e-2])
    assert learner.set_learning_rate(1, 4) == pytest.approx(0.75e-2)  # a function of the update, not of the calls


def test_gradients_are_clipped_together_and_the_norm_before_is_returned() -> None:
    learner = learner_of(with_adapters("llama", "sft", "reward"), max_gradient_norm=0.5)
    give_gradients(learner, 0)
    expected = sum(t.grad.square().sum() for t in learner.names if t.grad is not None) ** 0.5
    seen: list[float] = []
    learner.optimizer.register_step_pre_hook(
        lambda *_: seen.append(float(sum(t.grad.square().sum() for t in learner.names if t.grad is not None) ** 0.5))
    )
    assert learner.step() == pytest.approx(float(expected))
    assert seen == pytest.approx([0.5], rel=1e-4)
    assert not any(tensor.grad is None or tensor.grad.any() for tensor in learner.names)


def test_what_does_not_learn_has_no_gradient_that_its_moments_would_decay_by() -> None:
    learner = learner_of(with_adapters("llama", "sft", "reward"), "adapter")
    for moves_policy in (False, True):
        with learner.gradients(moves_policy=moves_policy):
            held = {name for tensor, name in learner.names.items() if tensor.grad is not None}
            assert {name.split("/")[0] for name in held} == {"value", "head"} | ({"policy"} if moves_policy else set())
        assert all(tensor.grad is None for tensor in learner.names)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["policy/", "head/"])
def test_a_gradient_that_is_not_finite_stops_before_anything_changes(which: str, bad: float) -> None:
    learner = learner_of(with_adapters("llama", "sft", "reward"))
    give_gradients(learner, 0)
    learner.step()
    before = learner.snapshot()
    give_gradients(learner, 1)
    tensor = next(tensor for tensor, name in learner.names.items() if name.startswith(which))
    assert tensor.grad is not None
    tensor.grad.view(-1)[0] = bad
    with pytest.raises(InvariantError, match=r"gradient norm is (nan|inf) before the optimizer's step"):
        learner.step()
    after = learner.snapshot()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_learner_from_a_checkpoint_goes_on_exactly(kind: str, tmp_path: Path) -> None:
    def steps(learner: ActorCritic, seeds: range) -> None:
        for seed in seeds:
            learner.set_learning_rate(seed, 9)
            give_gradients(learner, seed)
            learner.step()

    whole = learner_of(with_adapters("llama", "sft", "reward"), kind)
    steps(whole, range(5))
    stopped = learner_of(with_adapters("llama", "sft", "reward"), kind)
    steps(stopped, range(3))
    save_checkpoint(tmp_path, Checkpoint(3, stopped.checkpoint_groups(), {}), stage="ppo", base_identity="a", keep=1)
    found, _ = load_newest(tmp_path, base_identity="a")
    assert found is not None
    resumed = learner_of(with_adapters("llama", "sft", "reward"), kind)
    resumed.restore(found)
    steps(resumed, range(3, 5))
    expected = whole.snapshot()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.snapshot().items())


@pytest.mark.parametrize("kind", KINDS)
def test_policy_and_critic_are_saved_and_come_back(kind: str, tmp_path: Path) -> None:
    model = with_adapters("llama", "sft", "reward")
    learner = learner_of(model, kind)
    give_gradients(learner, 0)
    learner.step()
    found = {artifact.kind: artifact for artifact in learner.save(context_of(model, tmp_path, "ppo"), step=1)}
    assert set(found) == {"adapter", "head"} | ({"value_adapter"} if kind == "adapter" else set())
    other = resident()
    other.load("policy", found["adapter"].path)
    assert other.checksum("policy") == model.checksum("policy") != model.checksum("sft")
    head, statistics = load_head(found["head"].path, device=model.device)
    assert statistics is None
    assert torch.equal(head.weight, value_head_of(learner).weight)
    if kind == "adapter":
        other.load("value", found["value_adapter"].path)
        assert other.checksum("value") == model.checksum("value")


def test_the_optimizer_has_the_settings_that_were_given() -> None:
    learner = learner_of(with_adapters("llama", "sft", "reward"), betas=(0.8, 0.7), weight_decay=0.25)
    for group in learner.optimizer.param_groups:
        assert (group["betas"], group["weight_decay"], group["eps"]) == ((0.8, 0.7), 0.25, 1e-5)


@pytest.mark.parametrize(("kind", "times"), [("head", 10.0), ("adapter", 3.0)])
def test_a_critic_learns_faster_than_the_policy_unless_told(kind: str, times: float) -> None:
    model, config = with_adapters("llama", "sft", "reward"), OptimizerConfig(learning_rate=1e-3)
    learner = ActorCritic(model, CriticConfig.model_validate({"kind": kind}), config)
    assert [group["lr"] for group in learner.optimizer.param_groups] == pytest.approx([1e-3, times * 1e-3])
