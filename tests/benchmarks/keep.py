"""What a benchmark found: printed as JSON, and kept under tests/benchmarks/results/ for the README."""

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path

from tests.benchmarks.machine import describe_machine

RESULTS = Path(__file__).parent / "results"


def keep(name: str, result: Mapping[str, object]) -> None:
    """With the machine and the commit that it was found on."""
    whole = {"commit": _commit(), "machine": describe_machine(), **result}
    print(json.dumps(whole, ensure_ascii=False, default=str))
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(whole, indent=1, ensure_ascii=False, default=str) + "\n"
    (RESULTS / f"{name}.json").write_text(text, encoding="utf-8")


def _commit() -> str | None:
    """None outside a clone. Results that were kept before do not make it another one."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
