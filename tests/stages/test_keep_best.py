"""checkpoints.keep_best: what a look at held-out data found best stays, whatever else is due."""

from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import ValidationError

from align.artifacts import read_json
from align.config import PPOConfig, RewardConfig
from stages.ppo.train import run_ppo
from tests.resident import resident
from tests.stages.scenes import context_of, metrics_of, ppo_config, ppo_inputs, prompts
from tests.stages.test_continuation import reward

BEST_ONLY = {"every": None, "every_minutes": None, "keep_last": 1, "keep_best": 1}


def kept(folder: Path) -> dict[int, float | None]:
    """Step to quality of the checkpoints that are there."""
    found: dict[int, float | None] = {}
    for path in (folder / "checkpoints").iterdir():
        state = read_json(path / "state.json")
        assert isinstance(state, dict)
        found[int(path.name.removeprefix("update-"))] = state["quality"]
    return found


def best_and_last(looks: dict[float, float]) -> dict[float, float]:
    steps = {max(looks, key=looks.__getitem__), max(looks)}
    return {step: looks[step] for step in steps}


def test_ppo_keeps_the_best_by_held_out_score(tmp_path: Path) -> None:
    config = ppo_config(updates=6, checkpoints=BEST_ONLY, guard={"every": 1, "prompts": 4})
    inputs = replace(ppo_inputs(tmp_path), held_out=prompts(4))
    run_ppo(config, inputs, context_of(resident(), tmp_path, "ppo"))
    looks = {line["step"]: line["guard/score"] for line in metrics_of(tmp_path / "ppo") if 0 < line["step"] < 6}
    assert kept(tmp_path / "ppo") == best_and_last(looks)


def test_reward_training_keeps_the_best_by_held_out_loss(tmp_path: Path) -> None:
    reward(tmp_path, checkpoints=BEST_ONLY, early_stopping={"every": 1, "patience": 99}, learning_rate=0.1)
    lines = [line for line in metrics_of(tmp_path / "reward") if "reward/held_out_loss" in line]
    looks = {line["step"]: -line["reward/held_out_loss"] for line in lines if line["step"] < 9}
    best = max(looks, key=looks.__getitem__)
    assert kept(tmp_path / "reward") == {best: looks[best], 9: None}  # the last is of the member, trained


def test_without_looks_there_is_no_best() -> None:
    with pytest.raises(ValidationError, match=r"give guard\.every, too"):
        PPOConfig.model_validate({"checkpoints": {"keep_best": 1}})
    with pytest.raises(ValidationError, match=r"give early_stopping\.every, too"):
        RewardConfig.model_validate({"checkpoints": {"keep_best": 1}})
