"""A point of scaling as if the layers below all adapters were computed each time: python -m
tests.benchmarks.scaling_uncached JOB."""

import sys
from pathlib import Path
from typing import Any

from torch.utils.weak import WeakIdKeyDictionary

from align import layers
from tests.benchmarks import ppo_update_ours


class Forgetful(WeakIdKeyDictionary):
    """What is put in is kept (it takes the memory that it takes) and never found again."""

    def get(self, key: Any, default: Any = None) -> Any:
        return default


def main(path: Path) -> None:
    layers.WeakIdKeyDictionary = Forgetful
    ppo_update_ours.main(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
