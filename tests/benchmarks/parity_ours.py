"""One run of our PPO for learning-parity, in a process of its own: python -m tests.benchmarks.parity_ours JOB."""

import json
import sys
from pathlib import Path

import torch

from align.adapters import AdaptedModel
from align.base import load_base
from align.config import AdaptersConfig, BaseModelConfig, PPOConfig
from align.context import PPOInputs, StageContext, StageResult
from align.randomness import stage_seed
from align.tracking import Tracker
from data.records import Message, Prompt
from stages.ppo.train import run_ppo
from tests.benchmarks.parity_recipe import Job, Point, Recipe, read_job, write_result
from tests.benchmarks.parity_task import prompts

SCRIPTED = {"kind": "function", "function": "tests.benchmarks.parity_task:reward"}
LAM1, FAST = "-lam1", "-fast"  # what a system's name may end with


def resident(job: Job, *, is_fast: bool = False) -> AdaptedModel:
    """In float32, as TRL's; fast: in bfloat16 and with compiled layers."""
    config = BaseModelConfig(model=job.model, device="cpu", dtype="bfloat16" if is_fast else "float32", compile=is_fast)
    base = load_base(config)
    recipe = job.recipe
    return AdaptedModel(base, AdaptersConfig(rank=recipe.rank, alpha=recipe.alpha, targets=recipe.targets))


def records(texts: list[str]) -> tuple[Prompt, ...]:
    return tuple(Prompt((Message("user", text),), f"parity:{i}") for i, text in enumerate(texts))


def _config(recipe: Recipe, system: str) -> PPOConfig:
    """The recipe in our words. TRL's loop does not clip gradients, so ours is kept from it; a micro-batch of 8 is our
    default (it changes no gradient, only how minibatches are drawn)."""
    return PPOConfig.model_validate(
        {
            "updates": recipe.updates,
            "checkpoints": {"every": None, "every_minutes": None},
            "rollout": {
                "episodes": recipe.episodes,
                "temperature": recipe.temperature,
                "max_response_length": recipe.response_length,
                "batch_size": recipe.episodes,
            },
            "kl": {"coefficient": recipe.kl},
            "rewards": {"sources": [SCRIPTED], "normalize": "none", "clip": None, "missing_eos_penalty": 0.0},
            "advantage": {
                "gamma": recipe.gamma,
                "lam": 1.0 if system.endswith(LAM1) else recipe.lam,
                "whiten": True,
            },
            "critic": {
                "kind": system.removesuffix(LAM1).removesuffix(FAST),
                "coefficient": recipe.vf,
                "clip": recipe.value_clip,
            },
            "loss": {
                "epochs": recipe.epochs,
                "minibatches": recipe.minibatches,
                "micro_batch_size": 8,
                "clip_low": recipe.clip,
                "clip_high": recipe.clip,
            },
            "optimizer": {
                "learning_rate": recipe.learning_rate,
                "schedule": "linear",
                "betas": recipe.betas,
                "max_gradient_norm": 1e9,
            },
        }
    )


def train(config: PPOConfig, job: Job, folder: Path) -> StageResult:
    """One thread, as each of several processes has."""
    torch.set_num_threads(1)
    stage, seed = folder / "ppo", stage_seed(job.seed, "ppo")
    model = resident(job, is_fast=job.system.endswith(FAST))
    context = StageContext(model, Tracker(stage, stage="ppo"), stage, seed, None, 0.0)
    return run_ppo(config, PPOInputs(None, (), records(prompts()[0])), context)


def main(path: Path) -> None:
    job, folder = read_job(path)
    result = train(_config(job.recipe, job.system), job, folder)
    lines = (folder / "ppo" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    points = [json.loads(line) for line in lines]
    curve = [Point(point["episode"], point["objective/score"], point["objective/kl"]) for point in points]
    write_result(folder, job, result.artifact("adapter").path, curve)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
