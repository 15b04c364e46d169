"""Kill -9 and stops at random instants of the stages: what is resumed ends with the bytes of a run that nobody ended.

The short form kills twice a worker and twice a driver of tiny.yaml, in all three stages, stops three runs, and ends one
again and again; FAULTS=20 (make faults) kills each 20 times, then those of the quickstart once in each stage, and looks
at the clock.
"""

import os
import random
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from align.artifacts import newest_whole, read_json
from align.results import read_finished
from tests.shell import ROOT, TINY, Shell, descendants, finish, new_shell, reproducible, run_of, wait_until

pytestmark = pytest.mark.slow

QUICKSTART = ROOT / "configs" / "quickstart.yaml"
STAGES = ("sft", "reward", "ppo")
# Long enough to be hit anywhere, with a checkpoint after each update
SIZES = (
    *("sft.epochs=12", "sft.checkpoints.every=1", "reward.epochs=12", "reward.checkpoints.every=1"),
    *("ppo.updates=12", "ppo.checkpoints.every=1", "adapters.dropout=0.1"),
)
# The same run with checkpoints so rare that none comes by itself: what is there has been saved by the stop
RARE = tuple(f"{stage}.checkpoints.every=null" for stage in STAGES)
# Of the quickstart, whose default is every 5 minutes, so that what is killed is continued
SOME = ("sft.checkpoints.every=5", "reward.checkpoints.every=5")
AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
COUNT = int(os.environ.get("FAULTS", "2"))


@dataclass(frozen=True)
class Whole:
    """The run that nobody killed."""

    run: Path
    seconds: dict[str, float]  # of each stage


def run_whole(name: str, tmp_path_factory: pytest.TempPathFactory, *command: str | Path) -> Whole:
    shell = new_shell(tmp_path_factory.mktemp("whole"), tmp_path_factory.getbasetemp() / "align-cache")
    finished = shell.align("run", *command)
    assert finished.returncode == 0, finished.stderr
    run = run_of(shell, name)
    steps = {stage: read_finished(run / stage) for stage in STAGES}
    return Whole(run, {stage: step.vitals.seconds for stage, step in steps.items() if step is not None})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return run_whole("tiny", tmp_path_factory, TINY, *SIZES)


@pytest.fixture(scope="module")
def whole_quickstart(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    if COUNT < 20:
        pytest.skip("the quickstart is killed in the long form: make faults")
    return run_whole("quickstart", tmp_path_factory, QUICKSTART)


def start(stage: str, whole: Whole, shell: Shell, *overrides: str) -> subprocess.Popen[str]:
    """A run that has the stages before."""
    for earlier in STAGES[: STAGES.index(stage)]:
        shutil.copytree(whole.run / earlier, run_of(shell) / earlier)
    return shell.start("run", TINY, *SIZES, *overrides)


def start_until(instant: int, whole: Whole, shell: Shell) -> subprocess.Popen[str]:
    """Come back at a random instant of a stage."""
    stage = STAGES[instant % len(STAGES)]
    process = start(stage, whole, shell)
    wait_for(instant, stage, run_of(shell), whole, process)
    return process


def wait_for(instant: int, stage: str, run: Path, whole: Whole, process: subprocess.Popen[str]) -> None:
    """Until the stage has run for a random share of its time."""
    wait_until(lambda: (run / stage / "started.json").exists(), process)
    time.sleep(random.Random(instant).random() * whole.seconds[stage])


def worker_of(below: dict[int, str]) -> int:
    return next(pid for pid, title in below.items() if title.startswith("ray::Worker"))


def kill_driver(process: subprocess.Popen[str]) -> None:
    below = descendants(process.pid)
    process.kill()
    # Ray's agents look for their dead control service for a minute before they end; they hold nothing of the run
    finish(process, {pid: title for pid, title in below.items() if not title.startswith(AGENTS)})


def verify_same(run: Path, other: Path) -> None:
    """To the byte, and in every number of the summaries that is not a time or a size in memory."""
    assert reproducible(run) == reproducible(other)
    summary, expected = (read_json(folder / "summary.json") for folder in (run, other))
    assert isinstance(summary, dict)
    assert isinstance(expected, dict)
    assert all(summary[section] == expected[section] for section in ("sft", "reward", "ppo", "eval"))


@pytest.fixture
def shell(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Shell:
    return new_shell(tmp_path, tmp_path_factory.getbasetemp() / "align-cache")


@pytest.mark.parametrize("instant", range(COUNT))
def test_a_run_whose_worker_is_killed_goes_on_by_itself_to_the_same_bytes(
    instant: int, whole: Whole, shell: Shell
) -> None:
    process = start_until(instant, whole, shell)
    below = descendants(process.pid)
    os.kill(worker_of(below), signal.SIGKILL)
    finished = finish(process, descendants(process.pid) | below)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("warning: the worker died (") == 1, finished.stdout
    assert "Traceback" not in finished.stdout + finished.stderr
    assert reproducible(run_of(shell)) == reproducible(whole.run)


@pytest.mark.parametrize("instant", range(COUNT, 2 * COUNT))
def test_a_run_whose_driver_is_killed_is_resumed_to_the_same_bytes(instant: int, whole: Whole, shell: Shell) -> None:
    process = start_until(instant, whole, shell)
    kill_driver(process)
    finished = shell.align("run", TINY, *SIZES, "--resume")
    assert finished.returncode == 0, finished.stderr
    verify_same(run_of(shell), whole.run)


def logged_steps(run: Path, stage: str) -> int:
    path = run / stage / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def verify_stopped(stopped: subprocess.CompletedProcess[str], code: int) -> None:
    said = {130: "stopped", 143: "terminated"}[code]
    assert stopped.returncode == code
    assert stopped.stderr.startswith(f"error: {said}; finished stages and checkpoints are kept.")
    assert stopped.stderr.count("\n") == 1


def test_a_run_that_may_not_go_on_by_itself_says_how_to_and_ended_again_and_again_has_the_same_bytes(
    whole: Whole, shell: Shell
) -> None:
    run = run_of(shell)
    process = start("ppo", whole, shell, "cluster.max_failures=0")
    wait_until(lambda: logged_steps(run, "ppo") >= 3, process)
    below = descendants(process.pid)
    os.kill(worker_of(below), signal.SIGKILL)
    killed = finish(process, below)
    assert [line for line in killed.stdout.splitlines() if line.endswith(": skip (inputs unchanged)")] == [
        f"{stage}: skip (inputs unchanged)" for stage in ("sft", "reward")
    ]
    assert killed.returncode == 1
    assert killed.stderr.startswith("error: the worker died (ppo)")
    assert "--resume" in killed.stderr
    assert "Traceback" not in killed.stderr
    assert not (run / "ppo" / "result.json").exists()

    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        newest, _ = newest_whole(run / "ppo" / "checkpoints")
        assert newest is not None
        process = shell.start("run", TINY, *SIZES, "--resume")
        enough = newest.step + 2
        wait_until(lambda enough=enough: logged_steps(run, "ppo") >= enough, process)
        below = descendants(process.pid)
        process.send_signal(number)
        stopped = finish(process, below)
        assert f"ppo: resume (continues after update {newest.step})" in stopped.stdout
        verify_stopped(stopped, code)
        assert not (run / "ppo" / "result.json").exists()

    resumed = shell.align("run", TINY, *SIZES, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    verify_same(run, whole.run)


@pytest.mark.parametrize(
    ("stage", "number", "code"),
    [("sft", signal.SIGINT, 130), ("reward", signal.SIGTERM, 143), ("ppo", signal.SIGINT, 130)],
)
def test_a_run_that_is_stopped_has_its_last_finished_update_on_the_disk_and_leaves_nothing_else(
    stage: str, number: signal.Signals, code: int, whole: Whole, shell: Shell
) -> None:
    run = run_of(shell)
    process = start(stage, whole, shell, *RARE)
    wait_until(lambda: logged_steps(run, stage) >= 3, process)
    below = descendants(process.pid)
    process.send_signal(number)
    since = time.monotonic()
    stopped = finish(process, below)
    if COUNT >= 20:
        assert time.monotonic() - since < 10
    verify_stopped(stopped, code)
    assert f"stopping: {stage} has up to" in stopped.stdout
    newest, damage = newest_whole(run / stage / "checkpoints")
    assert newest is not None
    assert not damage
    assert newest.step == logged_steps(run, stage) >= 3
    assert not [path for path in run.rglob(".*") if path.name != ".lock"]
    resumed = shell.align("run", TINY, *SIZES, *RARE, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert f"{stage}: resume (continues after update {newest.step})" in resumed.stdout
    assert reproducible(run) == reproducible(whole.run)


def test_a_second_ctrl_c_ends_at_once(whole: Whole, shell: Shell) -> None:
    process = shell.start("run", TINY, *SIZES)
    wait_until(lambda: logged_steps(run_of(shell), "sft") >= 1, process)
    below = descendants(process.pid)
    os.kill(worker_of(below), signal.SIGSTOP)  # it would not hear of the first
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None
    while "stopping" not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGINT)
    ended = finish(process, {pid: title for pid, title in below.items() if not title.startswith(AGENTS)})
    assert (ended.returncode, ended.stderr) == (130, "")
    assert "ended at once by a second Ctrl-C; what was finished is kept. Continue: align run" in ended.stdout


def test_the_quickstart_whose_worker_is_killed_in_each_stage_ends_with_the_same_bytes(
    whole_quickstart: Whole, shell: Shell
) -> None:
    process = shell.start("run", QUICKSTART, *SOME)
    run, below = run_of(shell, "quickstart"), dict[int, str]()
    for instant, stage in enumerate(STAGES):
        wait_for(instant, stage, run, whole_quickstart, process)
        present = descendants(process.pid)
        os.kill(worker_of(present), signal.SIGKILL)
        below |= present
    finished = finish(process, descendants(process.pid) | below)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("warning: the worker died (") == len(STAGES), finished.stdout
    assert reproducible(run) == reproducible(whole_quickstart.run)


def test_the_quickstart_whose_driver_is_killed_in_each_stage_ends_with_the_same_bytes(
    whole_quickstart: Whole, shell: Shell
) -> None:
    run = run_of(shell, "quickstart")
    for instant, stage in enumerate(STAGES):
        process = shell.start("run", QUICKSTART, *SOME, *(["--resume"] if instant else []))
        wait_for(instant, stage, run, whole_quickstart, process)
        kill_driver(process)
    finished = shell.align("run", QUICKSTART, *SOME, "--resume")
    assert finished.returncode == 0, finished.stderr
    assert reproducible(run) == reproducible(whole_quickstart.run)
