"""Each way to score, to estimate an advantage and to hold the policy back trains the tiny config to a stated reward,
from the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.align.classifiers import write_classifier

ROOT = Path(__file__).resolve().parent.parent
LETTERS = 'ppo.rewards.sources=[{kind: function, function: "tests.align.scoring_functions:share_of_letters"}]'
# Ten updates of 32 episodes, of answers of 8 tokens
LEARNS = (
    "run.stages=[ppo]", "data.ppo.held_out.limit=8", "ppo.updates=10", "ppo.checkpoint_every=99",
    "ppo.rollout.episodes=32", "ppo.rollout.batch_size=32", "ppo.loss.micro_batch_size=16", "ppo.kl.coefficient=0.01",
    "ppo.rewards.missing_eos_penalty=0", "ppo.optimizer.learning_rate=2e-2", "ppo.optimizer.schedule=constant",
)  # fmt: skip


def aligned(folder: Path, *overrides: str) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """summary.json and the lines of ppo/metrics.jsonl of `align run configs/tiny.yaml` with these overrides."""
    command = [sys.executable, "-m", "align.cli", "run", "configs/tiny.yaml", f"run.root={folder}", *overrides]
    environment = {**os.environ, "HOME": str(folder), "ALIGN_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*command, "--json", "--quiet"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    metrics = (folder / "tiny" / "ppo" / "metrics.jsonl").read_text().splitlines()
    return json.loads(done.stdout), [json.loads(line) for line in metrics]


@pytest.mark.parametrize(
    "options",
    [
        ("ppo.advantage.estimator=gae", "ppo.kl.place=reward"),
        ("ppo.advantage.estimator=rloo", "ppo.rollout.responses_per_prompt=4", "ppo.kl.place=loss"),
        ("ppo.advantage.estimator=grpo", "ppo.rollout.responses_per_prompt=4", "ppo.kl.place=loss",
         "ppo.kl.estimator=k3"),
    ],
    ids=["gae, k1 in the reward", "rloo, k2 in the loss", "grpo, k3 in the loss"],
)  # fmt: skip
def test_a_reward_function_is_learnt_with_each_advantage_and_kl_placement(
    options: tuple[str, ...], tmp_path: Path
) -> None:
    summary, lines = aligned(tmp_path, *LEARNS, LETTERS, *options)
    assert lines[0]["objective/score"] < 0.3
    assert lines[-1]["objective/score"] > 0.7
    assert summary["eval"]["score_ppo"] > 0.7 > 0.3 > summary["eval"]["score_sft"]


def test_a_classifier_is_learnt(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path / "classifier", letters=True)
    source = f"{{kind: classifier, name: mood, model: {folder}, label: positive}}"
    summary, _ = aligned(tmp_path, *LEARNS, f"ppo.rewards.sources=[{source}]", "ppo.rewards.normalize=running")
    assert summary["eval"]["score_gain"] > 1.0  # nats of log-odds
    assert summary["eval"]["score_gain_ci95"][0] > 0
