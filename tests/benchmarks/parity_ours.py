"""One run of our PPO for learning-parity, in a process of its own: python -m tests.benchmarks.parity_ours JOB."""

import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from align.adapters import AdaptedModel
from align.artifacts import write_directory
from align.base import load_base
from align.config import AdaptersConfig, BaseModelConfig, PPOConfig
from align.context import PPOInputs, StageContext
from align.episodes import EpisodeBatch
from align.heads import ScalarHead, ScoreStatistics, save_head
from align.randomness import stage_seed
from align.tracking import Tracker
from data.records import Message, Prompt
from stages.ppo import rollout
from stages.ppo.train import run_ppo
from tests.benchmarks.parity_recipe import Job, Point, Recipe, read_job, write_result
from tests.benchmarks.parity_task import make_tokenizer, prompts, row_scorer


def reward_with_the_script() -> None:
    """The seam: the rollout's reward model is replaced by the scripted reward. To go once PPO takes a Python function
    as a source of rewards."""
    score_row = row_scorer(make_tokenizer())

    def score_pass(model: AdaptedModel, head: ScalarHead, batch: EpisodeBatch) -> Tensor:
        lengths_B = batch.prompt_length_B + batch.response_length_B
        rows = [ids[:length].tolist() for ids, length in zip(batch.ids_BS, lengths_B.tolist(), strict=True)]
        return torch.tensor([score_row(row) for row in rows], device=model.device)

    rollout.score_pass = score_pass


def resident(job: Job) -> AdaptedModel:
    base = load_base(BaseModelConfig(model=job.model, device="cpu"))
    recipe = job.recipe
    return AdaptedModel(base, AdaptersConfig(rank=recipe.rank, alpha=recipe.alpha, targets=recipe.targets))


def records(texts: list[str]) -> tuple[Prompt, ...]:
    return tuple(Prompt((Message("user", text),), f"parity:{i}") for i, text in enumerate(texts))


def _config(recipe: Recipe, critic: str) -> PPOConfig:
    """The recipe in our words. TRL's loop does not clip gradients, so ours is kept from it; a micro-batch of 8 is our
    default (it changes no gradient, only how minibatches are drawn)."""
    return PPOConfig.model_validate(
        {
            "updates": recipe.updates,
            "checkpoint_every": recipe.updates,
            "rollout": {
                "episodes": recipe.episodes,
                "temperature": recipe.temperature,
                "max_response_length": recipe.response_length,
                "batch_size": recipe.episodes,
            },
            "kl": {"coefficient": recipe.kl},
            "rewards": {"normalize": False, "clip": None, "missing_eos_penalty": 0.0},
            "advantage": {"gamma": recipe.gamma, "lam": recipe.lam, "whiten": True},
            "critic": {"kind": critic, "coefficient": recipe.vf, "clip": recipe.value_clip},
            "loss": {
                "epochs": recipe.epochs,
                "minibatches": recipe.minibatches,
                "micro_batch_size": 8,
                "clip": recipe.clip,
            },
            "optimizer": {
                "learning_rate": recipe.learning_rate,
                "schedule": "linear",
                "betas": recipe.betas,
                "max_gradient_norm": 1e9,
            },
        }
    )


def _inputs(model: AdaptedModel, folder: Path, seed: int) -> PPOInputs:
    """A reward model that says nothing: a zero adapter and a zero head. The script speaks in its place."""
    model.add("reward", seed=seed)
    identity, head = model.base_identity, ScalarHead(model.hidden_size)
    adapter = write_directory(
        folder / "reward" / "adapter", lambda path: model.save("reward", path),
        kind="adapter", stage="reward", step=0, base_identity=identity,
    )  # fmt: skip
    made = write_directory(
        folder / "reward" / "head", lambda path: save_head(head, path, ScoreStatistics(0.0, 1.0, 0)),
        kind="head", stage="reward", step=0, base_identity=identity,
    )  # fmt: skip
    model.reset()
    return PPOInputs(sft=None, reward_adapter=adapter, reward_head=made, prompts=records(prompts()[0]))


def main(path: Path) -> None:
    job, folder = read_job(path)
    torch.set_num_threads(1)
    reward_with_the_script()
    model = resident(job)
    stage, seed = folder / "ppo", stage_seed(job.seed, "ppo")
    context = StageContext(model, Tracker(stage, stage="ppo"), stage, seed, None, 0.0)
    result = run_ppo(_config(job.recipe, job.system), _inputs(model, folder, job.seed), context)
    lines = [json.loads(line) for line in (stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    curve = [Point(line["episode"], line["objective/score"], line["objective/kl"]) for line in lines]
    write_result(folder, job, result.artifact("adapter").path, curve)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
