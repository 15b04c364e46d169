"""What a benchmark found: printed as JSON, and kept under tests/benchmarks/results/ for the README."""

import json
from collections.abc import Mapping
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def keep(name: str, result: Mapping[str, object]) -> None:
    """With the machine's name where the benchmark has put it in."""
    print(json.dumps(result, ensure_ascii=False, default=str))
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(result, indent=1, ensure_ascii=False, default=str) + "\n"
    (RESULTS / f"{name}.json").write_text(text, encoding="utf-8")
