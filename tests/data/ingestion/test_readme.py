"""The README's three commands, from raw pairs to a reward model, as they stand there; on a tiny model."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from align.artifacts import read_artifact
from tests.benchmarks import hh_shaped

ROOT = Path(__file__).parents[3]


def commands() -> list[list[str]]:
    section = (ROOT / "README.md").read_text().partition("## Preference data that you can trust")[2]
    block = section.partition("```\n")[2].partition("```")[0]
    return [shlex.split(line, comments=True) for line in block.splitlines()]


@pytest.mark.slow
def test_a_reward_model_is_trained_from_raw_pairs_by_the_words_of_the_readme(tmp_path: Path) -> None:
    import gzip

    hh_shaped.write(tmp_path / "train.jsonl", 300)
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress((tmp_path / "train.jsonl").read_bytes()))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    for command in commands():
        assert command[0] == "align"
        words = [re.sub("^embedded$", "tiny:llama", word) for word in command[1:]]
        words = ["configs/tiny.yaml" if word == "configs/quickstart.yaml" else word for word in words]
        if words[0] == "run":
            words += ["base.dtype=float32"]
        done = subprocess.run(
            [sys.executable, "-m", "align.cli", *words], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
    run = tmp_path / "runs" / "hh"
    lineage = json.loads((run / "lineage.json").read_text())
    assert read_artifact(tmp_path / "sets" / "hh").content_hash in lineage["steps"]["reward"]["in"]["data.reward.train"]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["reward"]["held_out_pairs"] > 5
    assert (tmp_path / "hh.html").is_file()
