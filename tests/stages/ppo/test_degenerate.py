"""Rollouts that hold nothing to learn from: responses without a token but EOS, and scores that are all the same."""

from pathlib import Path

import pytest
import torch

from align.adapters import AdaptedModel
from align.config import PPOConfig
from align.errors import RewardFunctionError
from stages.ppo.train import run_ppo
from tests.resident import resident
from tests.stages.scenes import context_of, metrics_of, ppo_config, ppo_inputs

ESTIMATORS = ("gae", "rloo", "grpo")
FUNCTIONS = "tests.align.scoring_functions"


def config_of(estimator: str, **sections: object) -> PPOConfig:
    return ppo_config(updates=2, advantage={"estimator": estimator}, rollout={"responses_per_prompt": 4}, **sections)


def of_function(name: str, **fields: object) -> dict[str, object]:
    return {"kind": "function", "function": f"{FUNCTIONS}:{name}", **fields}


def saying_nothing() -> AdaptedModel:
    """A base that answers everything with EOS alone."""
    model = resident("gpt2")
    tensors = dict(model.base.model.named_parameters())
    with torch.no_grad():
        row = tensors["transformer.wte.weight"][model.base.eos_ids[0]]  # tied: the head's, too
        tensors["transformer.ln_f.bias"].copy_(1000 * row / row.square().sum())
    return model


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_responses_of_eos_alone_are_scored_and_learnt_from(estimator: str, tmp_path: Path) -> None:
    run_ppo(config_of(estimator), ppo_inputs(tmp_path, "gpt2"), context_of(saying_nothing(), tmp_path, "ppo"))
    lines = metrics_of(tmp_path / "ppo")
    assert [line["step"] for line in lines] == [1, 2]
    assert [line["rollout/response_length"] for line in lines] == [1.0, 1.0]
    assert [line["rollout/eos_rate"] for line in lines] == [1.0, 1.0]


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("normalize", ["running", "none"])
def test_scores_that_are_all_the_same_teach_nothing_and_stop_nothing(
    estimator: str, normalize: str, tmp_path: Path
) -> None:
    rewards = {"sources": [of_function("same")], "normalize": normalize, "missing_eos_penalty": 0.0}
    config = config_of(estimator, rewards=rewards, kl={"coefficient": 0.0})
    model = resident()
    run_ppo(config, ppo_inputs(tmp_path), context_of(model, tmp_path, "ppo"))
    lines = metrics_of(tmp_path / "ppo")
    assert [line["step"] for line in lines] == [1, 2]
    if estimator != "gae":  # its values are not those of the scores yet: it has advantages all the same
        assert all(line["loss/policy"] == 0.0 for line in lines)


def test_a_reward_function_that_hangs_ends_the_stage_in_its_time(tmp_path: Path) -> None:
    rewards = {"sources": [of_function("slow", timeout_seconds=0.5)], "normalize": "none"}
    with pytest.raises(RewardFunctionError, match=r"slow took more than timeout_seconds 0\.5 for the response"):
        run_ppo(config_of("gae", rewards=rewards), ppo_inputs(tmp_path), context_of(resident(), tmp_path, "ppo"))
    assert metrics_of(tmp_path / "ppo") == []
