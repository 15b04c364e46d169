import math
from pathlib import Path

import pytest

from align.config import SFTConfig
from align.context import SFTInputs
from stages.sft.train import run_sft
from stages.trainer import trainer_arguments
from tests.resident import resident
from tests.stages.scenes import context_of, demonstrations, metrics_of


def test_trainers_clip_gradients_to_1_and_decay_no_weights(tmp_path: Path) -> None:
    found = trainer_arguments(SFTConfig(), context_of(resident(), tmp_path, "sft"), tmp_path, num_rows=8)
    assert (found["max_grad_norm"], found["weight_decay"]) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0, 0.5, 1, 1, 1, 1]),
        ("linear", [0, 0.5, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0, 0.5, 1, *(0.5 + 0.5 * math.cos(k * math.pi / 4) for k in (1, 2, 3))]),
    ],
)
def test_the_rate_warms_up_and_then_follows_its_schedule(schedule: str, expected: list[float], tmp_path: Path) -> None:
    config = SFTConfig.model_validate(
        {
            "epochs": 3,
            "batch_size": 4,
            "micro_batch_size": 4,
            "max_length": 200,
            "learning_rate": 1e-3,
            "warmup_fraction": 1 / 3,
            "schedule": schedule,
        }
    )
    run_sft(config, SFTInputs(demonstrations(8), demonstrations(2)), context_of(resident(), tmp_path, "sft"))
    rates = [line["sft/learning_rate"] for line in metrics_of(tmp_path / "sft") if "sft/learning_rate" in line]
    assert rates == pytest.approx([1e-3 * factor for factor in expected], abs=1e-9)


@pytest.mark.parametrize(("rows", "rate"), [(19, 1e-3), (20, 0.0)])
def test_a_training_of_few_steps_learns_from_its_first_one(rows: int, rate: float, tmp_path: Path) -> None:
    """Of fewer than 20 steps the default warm-up is less than one, and one would be all that a short training has."""
    single = {"batch_size": 1, "micro_batch_size": 1, "max_length": 200, "learning_rate": 1e-3}
    config = SFTConfig.model_validate(single)
    run_sft(config, SFTInputs(demonstrations(rows), demonstrations(2)), context_of(resident(), tmp_path, "sft"))
    assert metrics_of(tmp_path / "sft")[0]["sft/learning_rate"] == rate
