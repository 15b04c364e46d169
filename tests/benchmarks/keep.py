"""What a benchmark found: printed as JSON, and kept under tests/benchmarks/results/ for the README."""

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path

from tests.benchmarks.machine import describe_machine

RESULTS = Path(__file__).parent / "results"


def commit_of(folder: Path) -> str | None:
    """Of the clone that a folder is in, "-dirty" if its files are other ones, results aside; None outside a clone."""

    def said(*command: str) -> str:
        return subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        is_dirty = said("status", "--porcelain", "--", ".", ":(exclude,top)tests/benchmarks/results")
        return said("rev-parse", "--short", "HEAD") + ("-dirty" if is_dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return None


_COMMIT = commit_of(Path(__file__).parents[2])  # before hours have passed


def keep(name: str, result: Mapping[str, object]) -> None:
    """With the machine and the commit that it was found on."""
    whole = {"commit": _COMMIT, "machine": describe_machine(), **result}
    print(json.dumps(whole, ensure_ascii=False, default=str))
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(whole, indent=1, ensure_ascii=False, default=str) + "\n"
    (RESULTS / f"{name}.json").write_text(text, encoding="utf-8")
