from dataclasses import replace
from pathlib import Path

import pytest
import torch

import align.rewards
from align.adapters import AdaptedModel
from align.context import PPOInputs
from align.episodes import EpisodeBatch, collate, policy_pass
from align.heads import ScalarHead
from align.sampler import Sampler
from stages.ppo.guard import Guard, HeldOut, measure
from stages.ppo.learn import Learner
from tests.resident import resident, with_adapters
from tests.stages.ppo.test_train import before_call, run
from tests.stages.scenes import (
    SAMPLING,
    hashes_of,
    metrics_of,
    ppo_config,
    ppo_inputs,
    prompts,
    reward_model_of,
    sources_of,
    tokenized,
)

WATCHED = {"every": 1, "prompts": 4}


def inputs_of(root: Path) -> PPOInputs:
    made = ppo_inputs(root)
    return PPOInputs(made.sft, made.reward_models, made.prompts, prompts(6))


def falling_scores(monkeypatch: pytest.MonkeyPatch, scores: list[float]) -> None:
    """Let the looks find these scores, one after another."""
    left = iter(scores)
    monkeypatch.setattr("stages.ppo.guard.measure", lambda held_out: (next(left), 0.5))


def policy_after(root: Path, updates: int) -> str:
    """Checksum of the policy that so many updates give; with a constant rate it does not matter how many follow."""
    config = ppo_config(updates=updates, optimizer={"schedule": "constant"}, checkpoints={"every": 99})
    model = with_adapters("llama")
    model.load("policy", run(root, config).artifact("adapter").path)
    return model.checksum("policy")


def test_a_held_out_score_that_falls_stops_the_run_and_the_best_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = policy_after(tmp_path / "two", 2)
    falling_scores(monkeypatch, [0.0, 1.0, 2.0, 1.5, 1.9])
    config = ppo_config(
        updates=9, guard={**WATCHED, "patience": 2}, optimizer={"schedule": "constant"}, checkpoints={"every": 99}
    )
    result = run(tmp_path / "guarded", config, inputs_of(tmp_path / "guarded"))
    assert (result.metrics["updates"], result.metrics["kept_update"]) == (4, 2)
    assert "below its best for 2 looks" in str(result.metrics["stopped"])
    assert "kept: the policy after update 2" in caplog.text
    found = result.artifact("adapter")
    assert found.step == 2
    model = with_adapters("llama")
    model.load("policy", found.path)
    assert model.checksum("policy") == expected
    lines = metrics_of(tmp_path / "guarded" / "ppo")
    assert [line["guard/score"] for line in lines] == [0.0, 1.0, 2.0, 1.5, 1.9]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]


def test_a_kl_over_the_limit_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    falling_scores(monkeypatch, [0.0, 1.0, 2.0, 3.0])
    config = ppo_config(guard={**WATCHED, "max_kl": 1e-9}, kl={"coefficient": 0.0})
    result = run(tmp_path, config, inputs_of(tmp_path))
    # The first rollout's KL is 0; that of the second is over any limit if it is above 0
    assert "passed ppo.guard.max_kl 1e-09" in str(result.metrics["stopped"])
    assert result.metrics["kept_update"] == result.metrics["updates"]


def test_without_a_reason_to_stop_the_last_policy_is_kept(tmp_path: Path) -> None:
    result = run(tmp_path, ppo_config(guard={"every": 2, "prompts": 4, "patience": 9}), inputs_of(tmp_path))
    assert (result.metrics["updates"], result.metrics["kept_update"], result.metrics["stopped"]) == (3, 3, None)
    looked = [line["step"] for line in metrics_of(tmp_path / "ppo") if "guard/score" in line]
    assert looked == [0, 2]


def test_looks_are_the_same_prompts_and_draws_and_see_the_policy(tmp_path: Path) -> None:
    config = ppo_config(guard=WATCHED, optimizer={"learning_rate": 1e-9})
    run(tmp_path, config, inputs_of(tmp_path))
    lines = metrics_of(tmp_path / "ppo")
    assert lines[0]["guard/kl"] == 0
    assert lines[1]["guard/score"] == pytest.approx(lines[0]["guard/score"], abs=1e-4)  # a policy that hardly moves


@pytest.mark.parametrize("stop_at", [1, 3, 4])
def test_a_resumed_run_remembers_guard_controller_and_normaliser(
    stop_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ppo_config(
        updates=7,
        checkpoints={"every": 1},
        guard={**WATCHED, "patience": 5},
        kl={"controller": "adaptive", "target": 0.01, "horizon": 20},
        rewards={"normalize": "running"},
        critic={"warmup_updates": 1},
        advantage={"whiten": False},
    )
    whole = run(tmp_path / "whole", config, inputs_of(tmp_path / "whole"))
    lines = metrics_of(tmp_path / "whole" / "ppo")
    assert len({line["objective/kl_coefficient"] for line in lines[1:]}) > 3

    def die() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        before_call(patch, "learn", die, call=stop_at, owner=Learner)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "stopped", config, inputs_of(tmp_path / "stopped"))
    again = run(tmp_path / "stopped", config, inputs_of(tmp_path / "stopped"), resume=True)
    assert again.metrics == whole.metrics
    assert hashes_of(tmp_path / "stopped" / "ppo") == hashes_of(tmp_path / "whole" / "ppo")


def test_a_guard_that_is_off_never_looks() -> None:
    config = ppo_config().guard
    guard = Guard(config, None)  # type: ignore[arg-type]
    assert not any(guard.is_due(update) for update in range(9))
    assert guard.reason_to_stop(1e9) is None


def test_rloo_learns_what_is_rewarded_without_a_critic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def length(model: AdaptedModel, head: ScalarHead, batch: EpisodeBatch) -> torch.Tensor:
        return batch.response_length_B.float()

    monkeypatch.setattr(align.rewards, "score_pass", length)
    config = ppo_config(advantage={"estimator": "rloo"}, rollout={"responses_per_prompt": 4})
    result = run(tmp_path, config, model=resident())
    assert {artifact.kind for artifact in result.artifacts} == {"adapter"}
    assert not any(name.startswith("value/") for name in metrics_of(tmp_path / "ppo")[0])


def test_a_new_best_gives_the_guard_patience_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    falling_scores(monkeypatch, [1.0, 0.5, 2.0, 1.5])
    result = run(tmp_path, ppo_config(guard={**WATCHED, "patience": 2}), inputs_of(tmp_path))
    assert (result.metrics["updates"], result.metrics["stopped"]) == (3, None)


def test_a_look_measures_the_policys_standardised_score_and_its_kl_at_the_sampling_temperature() -> None:
    model = with_adapters("llama", "sft", "policy", "reward")
    codec, sources = model.base.codec(None), sources_of(ppo_config(), model, reward_model_of(model))
    sampling, asked = replace(SAMPLING, temperature=0.7), tokenized((3, 4), (5, 6, 7))
    sampler = Sampler(model, codec, sampling, seed=0)
    score, kl = measure(HeldOut(asked, sampler, sources, 2))
    episodes = sampler.episodes(asked, role="policy", purpose="guard")
    batch, logprobs = collate(episodes, pad_id=codec.pad_id, device=model.device), dict[str, torch.Tensor]()
    for role in ("policy", "sft"):
        with torch.no_grad(), model.role(role):
            logprobs[role] = policy_pass(model, batch, temperature=0.7).logprobs_BT
    assert kl == pytest.approx((logprobs["policy"] - logprobs["sft"]).sum(-1).mean().item(), abs=1e-4)
    assert score == pytest.approx(sources.standardized(sources.score(batch, episodes)).mean().item(), abs=1e-4)
