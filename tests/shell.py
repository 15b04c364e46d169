"""`align` as a user runs it: in processes of its own, with a home of its own, under a real Ray."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from align.artifacts import sha256_of_file

ROOT = Path(__file__).parent.parent
TINY = ROOT / "configs" / "tiny.yaml"
SECRETS = {name: f"{name}-must-not-be-kept" for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY")}
PATIENCE_SECONDS = 1800.0  # for a machine that is busy with something else
_REPRODUCIBLE = ("adapter", "head", "value_adapter", "metrics.jsonl")


@dataclass(frozen=True)
class Shell:
    """A user's: a home, and a folder in which the commands are run."""

    folder: Path
    environment: dict[str, str]

    def start(self, *arguments: str | Path) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "align.cli", *map(str, arguments)],
            cwd=self.folder,
            env=self.environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            preexec_fn=hear_interrupts,
        )

    def align(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments)
        stdout, stderr = process.communicate(timeout=PATIENCE_SECONDS)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def hear_interrupts() -> None:
    """Whoever started the tests in the background may have had SIGINT ignored, which children inherit."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def new_shell(folder: Path, cache: Path) -> Shell:
    """With a home of its own (Ray writes a token there), no hub, secrets, and nothing of Ray's that this process may
    hold."""
    (folder / "home").mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    own = {"HOME": str(folder / "home"), "ALIGN_CACHE": str(cache), "PYTHONPATH": str(ROOT)}
    return Shell(folder, {**kept, **own, **SECRETS, "HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0"})


def run_of(shell: Shell, name: str = "tiny") -> Path:
    return shell.folder / "runs" / name


def reproducible(run: Path) -> dict[str, str]:
    """The hash of every file that the same command and seed must give again."""
    files = [file for name in _REPRODUCIBLE for path in run.glob(f"*/{name}") for file in (path, *path.rglob("*"))]
    return {file.relative_to(run).as_posix(): sha256_of_file(file) for file in sorted(files) if file.is_file()}


def wait_until(is_so: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not is_so():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def processes() -> Iterator[tuple[int, int, str]]:
    """(pid, parent, title) of all that run."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            yield int(folder.name), parent, (folder / "cmdline").read_text().replace("\0", " ")
        except (FileNotFoundError, ProcessLookupError):
            continue


def descendants(pid: int) -> dict[int, str]:
    """The titles of all processes below `pid`."""
    everything, found, new = list(processes()), dict[int, str](), {pid}
    while new:
        below = {child: title for child, parent, title in everything if parent in new and child not in found}
        found |= below
        new = set(below)
    return found


def finish(process: subprocess.Popen[str], below: dict[int, str]) -> subprocess.CompletedProcess[str]:
    """Wait for a command that was interrupted. It leaves no process behind: `below` were its own."""
    stdout, stderr = process.communicate(timeout=PATIENCE_SECONDS)
    deadline = time.monotonic() + 60
    while left := {pid for pid, _, title in processes() if below.get(pid) == title}:
        assert time.monotonic() < deadline, {pid: below[pid] for pid in left}
        time.sleep(0.2)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)
