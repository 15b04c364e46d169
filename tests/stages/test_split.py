"""A stage that computes its micro-batches in parts, as it does once memory ran out, ends the same to rounding."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from align.artifacts import read_json
from align.config import RewardConfig, SFTConfig
from align.context import RewardInputs, SFTInputs, StageResult
from data.batching import length_sorted_batches, prompt_sorted_batches
from stages.ppo.train import run_ppo
from stages.reward.train import run_reward
from stages.sft.train import run_sft
from tests.resident import resident
from tests.stages.scenes import (
    SAMPLING,
    comparisons,
    context_of,
    demonstrations,
    metrics_of,
    ppo_config,
    ppo_inputs,
    prompts,
)

# Epochs of two steps and a rest, so that some micro-batches are not whole
SMALL: dict[str, Any] = {"epochs": 2, "batch_size": 4, "micro_batch_size": 4, "max_length": 200, "learning_rate": 1e-4}


def sft(root: Path, split: int) -> StageResult:
    context = replace(context_of(resident(), root, "sft"), split=split)
    return run_sft(SFTConfig.model_validate(SMALL), SFTInputs(demonstrations(10), demonstrations(4)), context)


def reward(root: Path, split: int) -> StageResult:
    context = replace(context_of(resident(), root, "reward"), split=split)
    config = RewardConfig.model_validate({**SMALL, "early_stopping": {"every": 2}})
    return run_reward(config, RewardInputs(None, comparisons(10), comparisons(6, start=50), SAMPLING), context)


def ppo(root: Path, split: int) -> StageResult:
    config = ppo_config(
        updates=2,
        rollout={"episodes": 16},
        loss={"epochs": 2, "minibatches": 2, "micro_batch_size": 4, "ptx_coefficient": 0.5, "ptx_batch_size": 4},
        guard={"every": 1, "prompts": 4},
        optimizer={"learning_rate": 1e-4},
    )
    inputs = replace(ppo_inputs(root), held_out=prompts(4), ptx=demonstrations(6))
    return run_ppo(config, inputs, replace(context_of(resident(), root, "ppo"), split=split))


@pytest.mark.parametrize("stage", [sft, reward, ppo])
@pytest.mark.parametrize("split", [2, 4])
def test_a_stage_in_parts_ends_the_same_to_rounding(
    stage: Callable[[Path, int], StageResult], split: int, tmp_path: Path
) -> None:
    name = stage.__name__
    for parts in (1, split):
        stage(tmp_path / str(parts), parts)
    whole, parted = (load_file(tmp_path / str(n) / name / "adapter/adapter_model.safetensors") for n in (1, split))
    for key, tensor in whole.items():
        # Adam enlarges the rounding of gradients near zero; another split of the rows moves by up to a learning rate
        torch.testing.assert_close(parted[key], tensor, rtol=0, atol=2e-6)
    lines, others = (metrics_of(tmp_path / str(n) / name) for n in (1, split))
    for line, other in zip(lines, others, strict=True):
        assert other == pytest.approx(line, rel=1e-3, abs=1e-4)


def test_a_checkpoint_says_in_how_many_parts_it_was_computed(tmp_path: Path) -> None:
    ppo(tmp_path, 2)
    (state,) = [read_json(path) for path in (tmp_path / "ppo" / "checkpoints").glob("*/state.json")]
    assert isinstance(state, dict)
    assert state["split"] == 2


def test_the_parts_computed_at_once_are_as_small_as_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: set[int] = set()

    def seeing(batches: Callable[..., list[list[int]]]) -> Callable[..., list[list[int]]]:
        def seen(rows: list[Any], size: int) -> list[list[int]]:
            sizes.add(size)
            return batches(rows, size)

        return seen

    for module in ("stages.ppo.rollout", "stages.ppo.learn"):
        monkeypatch.setattr(f"{module}.length_sorted_batches", seeing(length_sorted_batches))
    monkeypatch.setattr("align.rewards.prompt_sorted_batches", seeing(prompt_sorted_batches))
    ppo(tmp_path, 4)
    assert sizes == {1}
