"""python -m tests.benchmarks NAME: prints a table and JSON, keeps them under tests/benchmarks/results/, exits with 1
when its bar is missed."""

import argparse
import sys
import tempfile
from pathlib import Path

from tests.benchmarks import quickstart, trl_parity

BENCHMARKS = {"quickstart": quickstart.run, "trl-parity": trl_parity.run}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("name", choices=sorted(BENCHMARKS))
    parser.add_argument("--root", type=Path, help="keep the runs here, and go on from those that are there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        return BENCHMARKS[arguments.name](arguments.root or Path(temporary))


if __name__ == "__main__":
    sys.exit(main())
