"""Time and memory of a command and of all processes that it starts."""

import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

INTERVAL_SECONDS = 0.05


@dataclass(frozen=True)
class Measured:
    seconds: float  # from before the start to the end of the process
    peak_rss_bytes: int  # of the whole tree at one moment; a page that two processes share counts twice
    stdout: str


def measure(command: list[str], folder: Path, *, environment: Mapping[str, str]) -> Measured:
    """Run `command` and wait; what it prints is kept in `folder`. RuntimeError, with the end of its stderr, if it
    fails."""
    folder.mkdir(parents=True, exist_ok=True)
    has_ended = threading.Event()
    with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as err, ThreadPoolExecutor(1) as pool:
        started = time.perf_counter()
        with subprocess.Popen(command, stdout=out, stderr=err, env=environment) as process:
            peak = pool.submit(_peak_rss, process.pid, has_ended)
            try:
                exit_code = process.wait()
            finally:
                has_ended.set()
        seconds = time.perf_counter() - started
    if exit_code:
        end = (folder / "stderr").read_text(encoding="utf-8", errors="replace")[-2000:]
        raise RuntimeError(f"{' '.join(command)}: exit code {exit_code}\n{end}")
    return Measured(seconds, peak.result(), (folder / "stdout").read_text(encoding="utf-8"))


def _peak_rss(root: int, has_ended: threading.Event) -> int:
    """The largest sum over the tree that a sample saw, or the largest that one process alone ever was."""
    peak = 0
    while not has_ended.wait(INTERVAL_SECONDS):
        sizes = [resident_bytes(process) for process in _tree(root)]
        peak = max(peak, sum(now for now, _ in sizes), *(highest for _, highest in sizes))
    return peak


def _tree(root: int) -> Iterator[int]:
    waiting = [root]
    while waiting:
        process = waiting.pop()
        yield process
        try:
            for thread in Path(f"/proc/{process}/task").iterdir():
                waiting += map(int, (thread / "children").read_text().split())
        except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            continue


def resident_bytes(process: int) -> tuple[int, int]:
    """Of one process: now, and at most so far. Both are 0 once it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0, 0
    sizes = {
        name: int(size.split()[0]) * 1024 for name, _, size in (line.partition(":") for line in lines if "kB" in line)
    }
    return sizes.get("VmRSS", 0), sizes.get("VmHWM", 0)  # one that waits to be reaped has neither
