"""The function of each step, imported where it runs: in the worker. The driver itself never loads torch."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from align.context import StageContext, StageResult
    from align.worker import StageFunction


def _sft(config: Any, inputs: Any, context: "StageContext") -> "StageResult":
    from stages.sft.train import run_sft

    return run_sft(config, inputs, context)


def _reward(config: Any, inputs: Any, context: "StageContext") -> "StageResult":
    from stages.reward.train import run_reward

    return run_reward(config, inputs, context)


def _ppo(config: Any, inputs: Any, context: "StageContext") -> "StageResult":
    from stages.ppo.train import run_ppo

    return run_ppo(config, inputs, context)


def _evaluation(config: Any, inputs: Any, context: "StageContext") -> "StageResult":
    from align.evaluation.run import run_evaluation

    return run_evaluation(config, inputs, context)


STAGE_FUNCTIONS: Mapping[str, "StageFunction"] = {
    "sft": _sft,
    "reward": _reward,
    "ppo": _ppo,
    "evaluation": _evaluation,
}
