"""A stage that TRL trains, stopped anywhere and resumed, leaves the bytes of one that never stopped."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

import stages.continuation
from align.config import RewardConfig, SFTConfig
from align.context import RewardInputs, SFTInputs, StageResult
from align.tracking import Tracker
from stages.continuation import put_random_states_back, random_states
from stages.reward.train import run_reward
from stages.sft.train import run_sft
from tests.resident import resident
from tests.stages.scenes import SAMPLING, comparisons, context_of, demonstrations, hashes_of, metrics_of

# Three epochs of three steps, the last of an epoch with fewer micro-batches, and dropout at work
SMALL: dict[str, Any] = {
    "epochs": 3,
    "batch_size": 4,
    "micro_batch_size": 2,
    "max_length": 200,
    "learning_rate": 5e-3,
    "warmup_fraction": 0.3,
    "checkpoints": {"every": 2},
}


def sft(root: Path, *, resume: bool = False, **settings: Any) -> StageResult:
    model = resident(dropout=0.1)
    inputs = SFTInputs(demonstrations(10), demonstrations(4))
    context = context_of(model, root, "sft", resume=resume)
    return run_sft(SFTConfig.model_validate({**SMALL, **settings}), inputs, context)


def reward(root: Path, *, resume: bool = False, **settings: Any) -> StageResult:
    model = resident(dropout=0.1)
    inputs = RewardInputs(None, comparisons(10), comparisons(6, start=50), SAMPLING)
    context = context_of(model, root, "reward", resume=resume)
    return run_reward(RewardConfig.model_validate({**SMALL, **settings}), inputs, context)


def ensemble(root: Path, *, resume: bool = False) -> StageResult:
    """Two members that stop early, and keep their best."""
    return reward(root, resume=resume, ensemble=2, early_stopping={"every": 1, "patience": 3})


def stop_at_line(number: int, run: Callable[[], StageResult], patch: pytest.MonkeyPatch) -> bool:
    """Run, and die as the line of this number would be logged; False if it came to its end before."""
    seen = 0

    def log(tracker: Tracker, step: int, metrics: dict[str, float]) -> None:
        nonlocal seen
        if seen == number:
            raise KeyboardInterrupt
        seen += 1
        own(tracker, step, metrics)

    own: Any = Tracker.log
    with patch.context() as inside:
        inside.setattr(Tracker, "log", log)
        try:
            run()
        except KeyboardInterrupt:
            return True
        return False


# Of which lines to die at: before the first checkpoint, amid an epoch and at its end, at a member's end and in the next
LINES = {sft: (0, 3, 6, 8), reward: (1, 5, 7), ensemble: (3, 9, 13, 20)}


@pytest.mark.parametrize("stage", LINES)
def test_a_resumed_stage_gives_the_bytes_of_an_uninterrupted_one(
    stage: Callable[..., StageResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = stage(tmp_path / "whole")
    folder = "sft" if stage is sft else "reward"
    lines = len(metrics_of(tmp_path / "whole" / folder))
    for line in LINES[stage]:
        assert line < lines
        root = tmp_path / f"stopped-{line}"
        assert stop_at_line(line, lambda root=root: stage(root), monkeypatch)
        result = stage(root, resume=True)
        assert result.metrics == whole.metrics, line
        assert hashes_of(root / folder) == hashes_of(tmp_path / "whole" / folder), line


def test_one_that_is_stopped_again_and_again_does_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sft(tmp_path / "whole")
    assert stop_at_line(3, lambda: sft(tmp_path / "stopped"), monkeypatch)
    for _ in range(2):  # each time two steps further, to the next checkpoint
        assert stop_at_line(3, lambda: sft(tmp_path / "stopped", resume=True), monkeypatch)
    sft(tmp_path / "stopped", resume=True)
    assert hashes_of(tmp_path / "stopped" / "sft") == hashes_of(tmp_path / "whole" / "sft")


def test_what_is_done_again_is_only_what_came_after_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    own = stages.continuation.TrainerCheckpoints.on_log

    def on_log(self: Any, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        steps.append(state.global_step)
        own(self, args, state, control, logs, **kwargs)

    monkeypatch.setattr(stages.continuation.TrainerCheckpoints, "on_log", on_log)
    assert stop_at_line(5, lambda: sft(tmp_path), monkeypatch)
    steps.clear()
    sft(tmp_path, resume=True)
    assert steps == [5, 6, 7, 8, 9, 9]  # the last step's own line, and that of the whole training


def test_no_checkpoint_holds_the_base_or_a_pickle(tmp_path: Path) -> None:
    for stage, name in ((sft, "sft"), (ensemble, "reward")):
        stage(tmp_path)
        [*_, newest] = sorted((tmp_path / name / "checkpoints").iterdir())
        assert {path.suffix for path in newest.iterdir()} == {".safetensors", ".json"}
        for path in newest.glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                keys = set(file.keys())
            learnt = {key for key in keys if "lora_" in key or key.startswith(("score.", "head/"))}
            assert learnt == keys or path.stem in ("random", "epoch_random"), (path, keys - learnt)


def test_random_states_come_back(tmp_path: Path) -> None:
    draw = lambda: (random.random(), float(np.random.rand()), torch.rand(3).tolist())  # noqa: E731
    saved = random_states()
    first = draw()
    assert draw() != first
    put_random_states_back(saved)
    assert draw() == first
