import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import align.rewards
from align.adapters import AdaptedModel
from align.artifacts import Artifact, write_directory
from align.config import PPOConfig
from align.context import PPOInputs, StageResult
from align.episodes import EpisodeBatch
from align.errors import ArtifactError, InvariantError
from align.heads import ScalarHead, ScoreStatistics, save_head
from align.rewards import RewardSources, Source
from align.sampler import Sampler
from stages.ppo.learn import Learner, estimate
from stages.ppo.metrics import describe
from stages.ppo.rollout import MicroBatch, Rollout
from stages.ppo.shaping import Shaped, Shaper
from stages.ppo.train import run_ppo
from tests.resident import SHAPES, resident
from tests.stages.scenes import context_of, hashes_of, metrics_of, nudge, ppo_config, ppo_inputs


def run(
    root: Path,
    config: PPOConfig,
    inputs: PPOInputs | None = None,
    *,
    model: AdaptedModel | None = None,
    seed: int = 0,
    resume: bool = False,
) -> StageResult:
    model = model or resident()
    return run_ppo(config, inputs or ppo_inputs(root), context_of(model, root, "ppo", seed=seed, resume=resume))


def before_call(
    monkeypatch: pytest.MonkeyPatch, name: str, do: Callable[[], None], *, call: int = 0, owner: object = Learner
) -> None:
    """Let `do` happen just before one call that the loop in stages.ppo.train makes."""
    plain = getattr(owner, name)
    calls: list[None] = []

    def wrapped(*args: object, **kwargs: object) -> object:
        if len(calls) == call:
            do()
        calls.append(None)
        return plain(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapped)


# ---- it learns ----


def test_a_policy_learns_to_say_what_is_rewarded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    liked = torch.arange(ord("a"), ord("a") + 32)

    def share_of_liked(model: AdaptedModel, head: ScalarHead, batch: EpisodeBatch) -> torch.Tensor:
        is_liked_BT = torch.isin(batch.ids_BS.gather(1, batch.response_positions_BT), liked)
        return (is_liked_BT * batch.is_response_BT).sum(-1) / batch.response_length_B

    monkeypatch.setattr(align.rewards, "score_pass", share_of_liked)
    model = resident()
    config = ppo_config(
        updates=10,
        checkpoints={"every": 99},
        rollout={"episodes": 32, "batch_size": 32},
        loss={"epochs": 2, "minibatches": 2, "micro_batch_size": 16},
        rewards={"normalize": "none", "missing_eos_penalty": 0.0},
        kl={"coefficient": 0.0},
        optimizer={"learning_rate": 2e-2, "schedule": "constant"},
        critic={"learning_rate": 2e-2},
    )
    run(tmp_path, config, ppo_inputs(tmp_path, sft=False), model=model)
    scores = [line["objective/score"] for line in metrics_of(tmp_path / "ppo")]
    assert scores[0] < 0.3
    assert sum(scores[-2:]) / 2 > 0.7


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("critic", ["head", "adapter"])
def test_a_run_trains_the_policy_and_leaves_base_sft_and_reward_alone(shape: str, critic: str, tmp_path: Path) -> None:
    model, inputs = resident(shape, dropout=0.1), ppo_inputs(tmp_path, shape)
    base = model.base_checksum()
    result = run(tmp_path, ppo_config(critic={"kind": critic}), inputs, model=model)
    assert result.metrics == {
        "first_step_kl": 0.0,
        "first_minibatch_ratio_error": 0.0,
        "updates": 3,
        "stopped": None,
        "kept_update": 3,
    }
    assert {artifact.kind for artifact in result.artifacts} == {"adapter", "head"} | (
        {"value_adapter"} if critic == "adapter" else set()
    )
    assert model.base_checksum() == base
    assert inputs.sft is not None
    model.load("sft as made", inputs.sft.path)
    model.load("reward as made", inputs.reward_models[0].adapter.path)
    assert model.checksum("sft") == model.checksum("sft as made") != model.checksum("policy")
    assert model.checksum("reward") == model.checksum("reward as made")
    lines = metrics_of(tmp_path / "ppo")
    assert [(line["step"], line["episode"]) for line in lines] == [(1, 8), (2, 16), (3, 24)]
    assert lines[0]["objective/kl"] == 0
    assert all(line["policy/first_ratio_error"] == 0 for line in lines)
    assert any(line["objective/kl"] != 0 for line in lines[1:])
    assert all(line["rollout/sampler_gap_max"] < 1e-4 for line in lines)


def test_a_run_in_bfloat16_has_ratio_1_and_kl_0_at_first(tmp_path: Path) -> None:
    result = run(tmp_path, ppo_config(updates=2), model=resident(dtype="bfloat16"))
    assert result.metrics["first_step_kl"] == 0
    assert all(line["policy/first_ratio_error"] == 0 for line in metrics_of(tmp_path / "ppo"))


def test_a_run_without_sft_has_the_base_as_its_reference(tmp_path: Path) -> None:
    model = resident()
    result = run(tmp_path, ppo_config(), ppo_inputs(tmp_path, sft=False), model=model)
    assert result.metrics["first_step_kl"] == 0
    assert all(not tensor.any() for key, tensor in model.tensors("sft").items() if "lora_B" in key)
    assert model.checksum("policy") != model.checksum("sft")


# ---- the same again ----


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        torch.manual_seed(len(name))
        run(tmp_path / name, ppo_config(), seed=seed)
    one, same, other = (hashes_of(tmp_path / name / "ppo") for name in ("one", "same", "other"))
    assert {"adapter/adapter_model.safetensors", "head/head.safetensors", "metrics.jsonl"} <= one.keys()
    assert one == same
    assert one["adapter/adapter_model.safetensors"] != other["adapter/adapter_model.safetensors"]


def test_nothing_of_an_update_is_left_when_the_next_one_generates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, kept = resident(layers=1), list[int]()

    def note() -> None:
        kept.append(len(model._decoder._said))  # pyright: ignore[reportPrivateUsage]

    before_call(monkeypatch, "episodes", note, call=1, owner=Sampler)
    before_call(monkeypatch, "learn", note, call=1)
    run(tmp_path, ppo_config(), model=model, inputs=ppo_inputs(tmp_path, layers=1))
    assert kept == [0, 4]  # and four micro-batches while it learns


def test_how_many_episodes_are_generated_side_by_side_does_not_change_the_result(tmp_path: Path) -> None:
    lines: list[list[dict[str, float]]] = []
    for size in (1, 8):
        run(tmp_path / str(size), ppo_config(rollout={"batch_size": size}))
        lines.append(metrics_of(tmp_path / str(size) / "ppo"))
    gaps = {"rollout/sampler_gap_max", "rollout/sampler_gap_mean"}  # these are about the sampler's own kernels
    assert [{k: v for k, v in line.items() if k not in gaps} for line in lines[0]] == [
        {k: v for k, v in line.items() if k not in gaps} for line in lines[1]
    ]


def run_until(root: Path, config: PPOConfig, monkeypatch: pytest.MonkeyPatch, *, update: int) -> None:
    """A run that dies when it is about to learn from the rollout of `update`, counted from 0."""

    def die() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        before_call(patch, "learn", die, call=update)
        with pytest.raises(KeyboardInterrupt):
            run(root, config)


@pytest.mark.parametrize("critic", ["head", "adapter"])
def test_a_resumed_run_gives_the_bytes_of_an_uninterrupted_one(
    critic: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ppo_config(updates=5, checkpoints={"every": 2}, critic={"kind": critic}, optimizer={"warmup_updates": 1})
    whole = run(tmp_path / "whole", config)
    # Update 4 (of 5) dies while learning: update 3 is in the metrics, but the newest checkpoint is of update 2
    run_until(tmp_path / "stopped", config, monkeypatch, update=3)
    assert [line["step"] for line in metrics_of(tmp_path / "stopped" / "ppo")] == [1, 2, 3]
    result = run(tmp_path / "stopped", config, resume=True)
    assert result.metrics == whole.metrics
    assert hashes_of(tmp_path / "stopped" / "ppo") == hashes_of(tmp_path / "whole" / "ppo")


def test_a_damaged_newest_checkpoint_is_passed_over_and_the_bytes_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = ppo_config(updates=4)
    run(tmp_path / "whole", config)
    run_until(tmp_path / "stopped", config, monkeypatch, update=3)
    (tmp_path / "stopped" / "ppo" / "checkpoints" / "update-00003" / "trained.safetensors").write_bytes(b"half")
    run(tmp_path / "stopped", config, resume=True)
    assert "update-00003 is damaged: trained.safetensors" in caplog.text
    assert hashes_of(tmp_path / "stopped" / "ppo") == hashes_of(tmp_path / "whole" / "ppo")


def test_resuming_without_a_checkpoint_starts_at_the_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ppo_config(checkpoints={"every": 9})
    run(tmp_path / "whole", config)
    run_until(tmp_path / "stopped", config, monkeypatch, update=1)
    run(tmp_path / "stopped", config, resume=True)
    assert hashes_of(tmp_path / "stopped" / "ppo") == hashes_of(tmp_path / "whole" / "ppo")


def test_a_checkpoint_of_another_base_is_refused(tmp_path: Path) -> None:
    run(tmp_path, ppo_config(updates=2))
    shutil.rmtree(tmp_path / "made")
    with pytest.raises(ArtifactError, match="was made on base"):
        run(tmp_path, ppo_config(updates=2), ppo_inputs(tmp_path, "qwen2"), model=resident("qwen2"), resume=True)


# ---- the invariants ----


def test_a_policy_that_is_no_copy_of_sft_is_noticed_before_the_first_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = resident()
    nudged = lambda: nudge(next(iter(model.tensors("policy").values())))  # noqa: E731
    before_call(monkeypatch, "episodes", nudged, owner=Sampler)
    with pytest.raises(
        InvariantError, match=r"policy differs from the reference: largest .* is [0-9.e-]+, allowed 1e-05"
    ):
        run(tmp_path, ppo_config(), model=model)
    assert metrics_of(tmp_path / "ppo") == []


@pytest.mark.parametrize("update", [0, 1])
def test_a_policy_changed_after_the_rollout_is_noticed_in_every_update(
    update: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = resident()
    before_call(monkeypatch, "learn", lambda: nudge(next(iter(model.tensors("policy").values()))), call=update)
    with pytest.raises(InvariantError, match="first minibatch's ratio is not 1"):
        run(tmp_path, ppo_config(), model=model)
    assert len(metrics_of(tmp_path / "ppo")) == update


@pytest.mark.parametrize("name", ["sft", "reward"])
def test_a_frozen_adapter_that_changes_during_an_update_is_noticed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = resident()
    before_call(monkeypatch, "learn", lambda: nudge(next(iter(model.tensors(name).values()))), call=1)
    with pytest.raises(InvariantError, match=f"frozen adapter {name} changed during the update"):
        run(tmp_path, ppo_config(), model=model)
    assert len(metrics_of(tmp_path / "ppo")) == 1


def test_a_reward_model_that_says_nan_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        align.rewards, "score_pass", lambda model, head, batch: torch.full((len(batch.ids_BS),), torch.nan)
    )
    model = resident()
    with pytest.raises(InvariantError, match=r"ppo update 1, minibatch 1: not finite .*'loss/policy': nan"):
        run(tmp_path, ppo_config(), model=model)
    assert model.checksum("policy") == model.checksum("sft")


def test_a_reward_model_without_its_scale_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"holds no statistics\.json.*train the reward stage"):
        run(tmp_path, ppo_config(), ppo_inputs(tmp_path, statistics=None))


def test_prompts_over_length_are_set_aside_and_counted(tmp_path: Path) -> None:
    inputs = ppo_inputs(tmp_path)
    longest = max(len(prompt.messages[0].content) for prompt in inputs.prompts)
    too_long = replace(inputs.prompts[0], messages=(replace(inputs.prompts[0].messages[0], content="a" * 300),))
    inputs = replace(inputs, prompts=(*inputs.prompts, too_long))
    context = context_of(resident(), tmp_path, "ppo", max_reject_rate=0.5)
    result = run_ppo(ppo_config(updates=1), inputs, context)
    assert longest < 300
    assert result.account is not None
    assert result.account.rejected == (("prompt over length", 1),)


# ---- the numbers ----


def rollout_by_hand() -> Rollout:
    """Two episodes, of two tokens and of one."""
    batch = EpisodeBatch(
        torch.tensor([[9, 1, 2], [9, 3, 0]]),
        torch.tensor([[True, True, True], [True, True, False]]),
        torch.tensor([1, 1]),
        torch.tensor([2, 1]),
    )
    micro_batch = MicroBatch(
        batch=batch,
        is_response_BT=batch.is_response_BT,
        has_eos_B=torch.tensor([True, False]),
        logprobs_BT=torch.tensor([[-1.0, -2.0], [-0.5, 0.0]]),
        ref_logprobs_BT=torch.tensor([[-1.5, -1.0], [-1.5, 0.0]]),
        entropy_BT=torch.tensor([[2.0, 3.0], [1.0, 0.0]]),
        values_BT=torch.tensor([[0.5, 1.0], [-1.0, 0.0]]),
        group_B=torch.tensor([0, 1]),
        scores={"reward": torch.tensor([4.0, -2.0])},
    )
    return Rollout((micro_batch,), 0.25, 0.125)


def test_rewards_of_a_rollout_are_the_normalised_scores_less_kl() -> None:
    # scores (4−1)/2 = 1.5; (−2−1)/2 = −1.5, less 1 without EOS. k1: 0.5, −1 | 1. β = 0.1
    shaped, _ = shaped_by_hand(ppo_config(kl={"coefficient": 0.1}, rewards={"missing_eos_penalty": 1.0}))
    assert shaped.scores[0].tolist() == [1.5, -2.5]
    torch.testing.assert_close(shaped.rewards[0], torch.tensor([[-0.05, 1.6], [-2.6, 0.0]]))


def shaped_by_hand(config: PPOConfig) -> tuple[Shaped, RewardSources]:
    """With a reward model whose score has mean 1 and standard deviation 2."""
    source = Source("reward", 1.0, lambda batch, episodes: torch.zeros(2), ScoreStatistics(1.0, 2.0, 8))
    sources = RewardSources((source,))
    return Shaper(config.rewards, config.kl, sources, max_response_length=4).shape(rollout_by_hand()), sources


def test_the_metrics_of_a_rollout_by_hand() -> None:
    config = ppo_config(
        kl={"coefficient": 0.1}, rewards={"missing_eos_penalty": 1.0}, advantage={"lam": 1.0, "whiten": False}
    )
    shaped, sources = shaped_by_hand(config)
    rollout = rollout_by_hand()
    experience = estimate(rollout, shaped.rewards, config.advantage)
    # With λ = 1 returns are sums of rewards: 1.55, 1.6 | −2.6
    torch.testing.assert_close(experience[0].returns_BT, torch.tensor([[1.55, 1.6], [-2.6, 0.0]]))
    returns, values = torch.tensor([1.55, 1.6, -2.6]), torch.tensor([0.5, 1.0, -1.0])
    found = describe(rollout, shaped, experience, sources, has_critic=True)
    k3 = [math_k3(0.5) + math_k3(-1.0), math_k3(1.0)]
    assert found == pytest.approx(
        {
            "objective/kl": 0.25,  # (0.5 − 1 + 1) / 2 responses
            "objective/kl_k3": sum(k3) / 2,
            "objective/score": 1.0,
            "objective/score_std": 3.0,
            "objective/shaped_score": -0.5,
            "objective/rlhf_reward": -0.525,
            "objective/kl_coefficient": 0.1,
            "policy/entropy": 2.0,  # 6 nats over 3 tokens
            "rollout/response_length": 1.5,
            "rollout/eos_rate": 0.5,
            "value/mean": 0.5 / 3,
            "value/explained_variance": 1 - ((returns - values).var() / returns.var()).item(),
            "rollout/sampler_gap_max": 0.25,
            "rollout/sampler_gap_mean": 0.125,
        }
    )


def math_k3(k1: float) -> float:
    return 2.718281828459045**-k1 - 1 + k1


def test_artifacts_name_their_stage_step_and_base(tmp_path: Path) -> None:
    model = resident()
    result = run(tmp_path, ppo_config(updates=2), model=model)
    found: Artifact = result.artifact("adapter")
    assert (found.stage, found.step, found.base_identity) == ("ppo", 2, model.base_identity)


def test_a_head_for_another_width_is_refused_with_both_widths(tmp_path: Path) -> None:
    inputs = ppo_inputs(tmp_path)
    wide = write_directory(
        tmp_path / "wide",
        lambda path: save_head(ScalarHead(48), path, ScoreStatistics(0.0, 1.0, 8)),
        kind="head",
        stage="reward",
        step=1,
        base_identity=inputs.reward_models[0].head.base_identity,
    )
    with pytest.raises(ArtifactError, match="hidden size 48, this base has 32"):
        run(
            tmp_path,
            ppo_config(updates=1),
            replace(inputs, reward_models=(replace(inputs.reward_models[0], head=wide),)),
        )


def test_what_a_checkpoint_took_stands_in_the_timings_of_the_update_after_it(tmp_path: Path) -> None:
    run_ppo(ppo_config(updates=3), ppo_inputs(tmp_path), context_of(resident(), tmp_path, "ppo"))
    lines = [json.loads(line) for line in (tmp_path / "ppo" / "timings.jsonl").read_text().splitlines()]
    first, second, third = (line["seconds/checkpoint"] for line in lines)
    assert (first, second > 0, third > 0) == (0.0, True, True)


def test_policy_reference_and_learner_look_at_the_sampling_temperature(tmp_path: Path) -> None:
    result = run(tmp_path, ppo_config(updates=2, rollout={"temperature": 0.7}))
    assert (result.metrics["first_step_kl"], result.metrics["first_minibatch_ratio_error"]) == (0.0, 0.0)
    assert all(line["rollout/sampler_gap_max"] < 1e-4 for line in metrics_of(tmp_path / "ppo"))


def test_the_controller_is_told_the_kl_that_is_logged_and_of_how_many_episodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[float, int]] = []
    monkeypatch.setattr(Shaper, "adapt", lambda _, kl, *, num_episodes: told.append((kl, num_episodes)))
    run(tmp_path, ppo_config(rollout={"responses_per_prompt": 2}))
    assert told == [(line["objective/kl"], 8) for line in metrics_of(tmp_path / "ppo")]
