"""A worker that Ray's own memory monitor ends: the run goes on by itself, in smaller parts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.align.recipe import write_recipe
from tests.shell import PATIENCE_SECONDS, new_shell

pytestmark = pytest.mark.slow
PROGRAM = """
import json, sys
from pathlib import Path
from tests.align import fake_stages
from tests.align.test_driver import Recorder, run

display = Recorder()
run(Path(sys.argv[1]), stage="sft", display=display, change={"sft": fake_stages.hungry})
print(json.dumps(display.notes))
"""


def used_share() -> float:
    """Of the machine's memory, what is in use."""
    lines = [line.split() for line in Path("/proc/meminfo").read_text().splitlines()]
    sizes = {line[0]: int(line[1]) for line in lines}
    return 1 - sizes["MemAvailable:"] / sizes["MemTotal:"]


def test_a_worker_that_ray_ends_for_its_memory_goes_on_in_smaller_parts(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    shell = new_shell(tmp_path, tmp_path_factory.getbasetemp() / "align-cache")
    write_recipe(tmp_path)
    allowed = used_share() + 0.1  # a tenth of the machine, whatever else runs on it
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        env={**shell.environment, "RAY_memory_usage_threshold": f"{allowed:.3f}"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    (said,) = (note for note in json.loads(done.stdout.splitlines()[-1]) if note.startswith("warning"))
    assert said.startswith("warning: out of memory in sft: Ray ended the worker, its node had ")
    assert "a new worker computes 4 of a micro-batch's 8 rows at a time" in said
    assert len(said) < 400
