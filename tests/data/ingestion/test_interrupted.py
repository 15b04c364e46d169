"""A killed ingestion leaves nothing that passes for a data set, and running again makes what it would have made."""

import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path

import pytest

from tests.benchmarks import hh_shaped
from tests.data.ingestion.outcome import digests, start_ingestion

PAIRS = 8000  # 11 MB: more than one piece, so that there are worker processes to be killed, too
# Things that appear in the folder in which the data set is made: the pieces' place, the data set's, the data set.
PHASES = 3
MOMENTS = 3  # one in each third of a phase


@dataclass(frozen=True)
class Undisturbed:
    files: dict[str, str]
    phases: list[float]  # seconds from one appearance to the next; the last to the end


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "pairs.jsonl"
    hh_shaped.write(path, PAIRS)
    return path


@pytest.fixture(scope="module")
def undisturbed(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    to = tmp_path_factory.mktemp("undisturbed") / "made"
    with start_ingestion([file], to) as process:
        times = list(_appearances(process, to.parent))
        assert process.wait() == 0
    assert len(times) == PHASES
    return Undisturbed(digests(to), [end - start for start, end in pairwise([*times, time.perf_counter()])])


def _appearances(process: subprocess.Popen[bytes], folder: Path) -> Iterator[float]:
    """The time whenever something new lies in the folder, until the process ends."""
    seen: set[str] = set()
    while process.poll() is None:
        new = {path.name for path in folder.iterdir()} - seen
        seen |= new
        yield from [time.perf_counter()] * len(new)
        time.sleep(0.001)


@pytest.mark.slow
@pytest.mark.parametrize("third", range(MOMENTS))
@pytest.mark.parametrize("phase", range(PHASES))
def test_after_a_kill_there_is_no_data_set_or_a_whole_one_and_running_again_completes_it(
    file: Path, undisturbed: Undisturbed, tmp_path: Path, phase: int, third: int
) -> None:
    to = tmp_path / "made"
    with start_ingestion([file], to) as process:
        for _ in islice(_appearances(process, tmp_path), phase + 1):
            pass
        share = (third + random.Random(f"{phase}, {third}").random()) / MOMENTS
        time.sleep(share * undisturbed.phases[phase])
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    if not to.exists():
        with start_ingestion([file], to) as process:
            assert process.wait() == 0
        assert [path.name for path in tmp_path.iterdir()] == ["made"]
    assert digests(to) == undisturbed.files


@pytest.mark.slow
def test_running_twice_gives_the_same_bytes_whatever_the_hash_seed(
    file: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    with start_ingestion([file], tmp_path / "made", hash_seed=1) as process:
        assert process.wait() == 0
    assert digests(tmp_path / "made") == undisturbed.files
