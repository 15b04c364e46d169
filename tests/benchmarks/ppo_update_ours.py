"""Our PPO for ppo-update, in a process of its own: python -m tests.benchmarks.ppo_update_ours JOB.

The stage function itself on prepared artifacts, without Ray; its phases are those that it writes to timings.jsonl. What
it imports only once it runs (transformers' llama) does not count as imports.
"""

import json
import os
import sys
from itertools import pairwise
from pathlib import Path

import torch

from align.adapters import AdaptedModel
from align.artifacts import read_artifact
from align.base import load_base
from align.config import AdaptersConfig, BaseModelConfig, PPOConfig
from align.context import PPOInputs, RewardModelArtifacts, StageContext
from align.randomness import stage_seed
from align.tracking import Tracker
from data.records import Message, Prompt
from stages.ppo.train import run_ppo
from tests.benchmarks.ppo_update_bars import COMPILED
from tests.benchmarks.ppo_update_task import (
    BASE,
    HEAD,
    PROMPTS,
    REWARD,
    SFT,
    Job,
    Task,
    Update,
    read_job,
    write_report,
)
from tests.benchmarks.process_tree import resident_bytes


def adapters_of(task: Task) -> AdaptersConfig:
    return AdaptersConfig(rank=task.rank, alpha=task.alpha, layers=task.adapted_layers)


def _config(task: Task, critic: str) -> PPOConfig:
    return PPOConfig.model_validate(
        {
            "updates": task.updates,
            "checkpoints": {"every": None, "every_minutes": None},
            "rollout": {
                "episodes": task.episodes,
                "temperature": task.temperature,
                "max_prompt_length": task.prompt_length,
                "max_response_length": task.response_length,
                "batch_size": task.episodes,
            },
            "rewards": {"missing_eos_penalty": 0.0},
            "advantage": {"lam": task.lam},
            "critic": {"kind": critic},
            "loss": {"epochs": task.epochs, "minibatches": task.minibatches, "micro_batch_size": task.micro_batch},
            "optimizer": {"learning_rate": task.learning_rate},
        }
    )


def load_model(job: Job) -> AdaptedModel:
    base = load_base(
        BaseModelConfig.model_validate(
            {
                "model": str(Path(job.prepared) / BASE),
                "dtype": job.dtype,
                "device": "cpu",
                "compile": job.system.endswith(COMPILED),
            },
        )
    )
    return AdaptedModel(base, adapters_of(job.task))


def _inputs(prepared: Path, reward_models: int) -> PPOInputs:
    sft, reward, head = (read_artifact(prepared / name) for name in (SFT, REWARD, HEAD))
    texts = json.loads((prepared / PROMPTS).read_text(encoding="utf-8"))
    prompts = tuple(Prompt((Message("user", text),), f"prompt:{i}") for i, text in enumerate(texts))
    return PPOInputs(sft, (RewardModelArtifacts(reward, head),) * reward_models, prompts)


def _lines(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def updates_of(folder: Path) -> list[Update]:
    """Of a stage's folder, without the first. The whole is the time between two lines, whatever they call a phase."""
    return [
        Update(
            generate=line["seconds/generate"],
            score=line["seconds/score"],
            learn=line["seconds/learn"],
            whole=line["time"] - before["time"],
        )
        for before, line in pairwise(_lines(folder / "timings.jsonl"))
    ]


def run_task(job: Job, stage: Path, model: AdaptedModel, tracker: Tracker) -> None:
    """All updates of the task. Raises RuntimeError if a response was not as long as the task says."""
    task = job.task
    context = StageContext(model, tracker, stage, stage_seed(0, "ppo"), None, 0.0)
    run_ppo(_config(task, job.system.removesuffix(COMPILED)), _inputs(Path(job.prepared), task.reward_models), context)
    lengths = {line["rollout/response_length"] for line in _lines(stage / "metrics.jsonl")}
    if lengths != {task.response_length}:
        raise RuntimeError(f"responses were to be of {task.response_length} tokens, their mean lengths are {lengths}")


def main(path: Path) -> None:
    imports_bytes, _ = resident_bytes(os.getpid())
    job, folder = read_job(path)
    task, stage = job.task, folder / "ppo"
    run_task(job, stage, load_model(job), Tracker(stage, stage="ppo"))
    write_report(
        folder,
        job,
        updates_of(stage),
        optimizer_steps=task.epochs * task.minibatches,
        imports_bytes=imports_bytes,
        threads=torch.get_num_threads(),
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
