"""python -m tests.benchmarks NAME: prints a table and JSON, keeps them under tests/benchmarks/results/, exits with 1
when its bar is missed."""

import argparse
import importlib
import sys
import tempfile
from pathlib import Path

BENCHMARKS = (
    "defaults",
    "ensemble-cost",
    "forecast",
    "ingestion",
    "learning-parity",
    "memory",
    "overoptimisation",
    "ppo-update",
    "quickstart",
    "rollout",
    "roofline",
    "scaling",
    "trl-parity",
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("name", choices=BENCHMARKS)
    parser.add_argument("--root", type=Path, help="keep the runs here, and go on from those that are there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        # imported by name, so that the quickstart's benchmark does not load the torch and transformers of the others
        benchmark = importlib.import_module(f"tests.benchmarks.{arguments.name.replace('-', '_')}")
        return int(benchmark.run(arguments.root or Path(temporary)))


if __name__ == "__main__":
    sys.exit(main())
