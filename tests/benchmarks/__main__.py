"""python -m tests.benchmarks NAME: prints a table and JSON, keeps them under tests/benchmarks/results/, exits with 1
when its bar is missed."""

import argparse
import sys

from tests.benchmarks import quickstart

BENCHMARKS = {"quickstart": quickstart.run}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("name", choices=sorted(BENCHMARKS))
    return BENCHMARKS[parser.parse_args().name]()


if __name__ == "__main__":
    sys.exit(main())
