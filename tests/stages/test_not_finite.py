"""A loss that is no number ends a stage at once, with the step and the metric named and nothing of it kept."""

import re
from pathlib import Path

import pytest
import torch

from align.adapters import AdaptedModel
from align.artifacts import checkpoint_folders
from align.config import RewardConfig, SFTConfig
from align.context import RewardInputs, SFTInputs
from align.errors import InvariantError
from stages.ppo.train import run_ppo
from stages.reward.train import run_reward
from stages.sft.train import run_sft
from tests.resident import resident
from tests.stages.scenes import SAMPLING, comparisons, context_of, demonstrations, metrics_of, ppo_config, ppo_inputs

SMALL = {"epochs": 1, "batch_size": 4, "micro_batch_size": 4, "max_length": 200, "checkpoints": {"every": 1}}


def spoiled() -> AdaptedModel:
    """A base with one weight that is no number, in its second layer."""
    model = resident()
    with torch.no_grad():
        weight = next(tensor for name, tensor in model.base.model.named_parameters() if "layers.1." in name)
        weight.view(-1)[0] = torch.nan
    return model


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ("sft", "sft step 1: not finite"),
        ("reward", "reward step 1: not finite"),
        ("ppo", "logits of response 0 at token 0 are not finite"),
    ],
)
def test_a_stage_that_computes_no_number_says_where_and_keeps_no_checkpoint_of_it(
    stage: str, message: str, tmp_path: Path
) -> None:
    context = context_of(spoiled(), tmp_path, stage)
    with pytest.raises(InvariantError, match=message):  # noqa: PT012 - one call, of three
        if stage == "sft":
            run_sft(SFTConfig.model_validate(SMALL), SFTInputs(demonstrations(8), demonstrations(2)), context)
        elif stage == "reward":
            inputs = RewardInputs(None, comparisons(8), comparisons(2, start=8), SAMPLING)
            run_reward(RewardConfig.model_validate(SMALL), inputs, context)
        else:
            run_ppo(ppo_config(updates=1), ppo_inputs(tmp_path), context)
    assert metrics_of(tmp_path / stage) == []
    assert checkpoint_folders(tmp_path / stage / "checkpoints") == []


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_a_stage_that_diverges_in_its_last_step_is_not_finished(stage: str, tmp_path: Path) -> None:
    context = context_of(resident(), tmp_path, stage)
    settings = {**SMALL, "learning_rate": 1e30}
    said = "sft: not finite at its end: {'nll_after': nan}" if stage == "sft" else "reward: scores of reward are not"
    with pytest.raises(InvariantError, match=re.escape(said)):  # noqa: PT012 - one call, of two
        if stage == "sft":
            run_sft(SFTConfig.model_validate(settings), SFTInputs(demonstrations(4), demonstrations(2)), context)
        else:
            inputs = RewardInputs(None, comparisons(4), comparisons(2, start=8), SAMPLING)
            run_reward(RewardConfig.model_validate(settings), inputs, context)


def test_a_reward_model_that_diverges_says_at_which_step(tmp_path: Path) -> None:
    config = RewardConfig.model_validate({**SMALL, "learning_rate": 1e30, "epochs": 4})
    inputs = RewardInputs(None, comparisons(8), comparisons(2, start=8), SAMPLING)
    with pytest.raises(InvariantError, match=r"reward step \d: not finite"):
        run_reward(config, inputs, context_of(resident(), tmp_path, "reward"))
