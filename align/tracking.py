"""What a run writes about itself: metrics.jsonl (reproducible values only), timings.jsonl (clocks and memory),
status.json (for progress bars and `align status`), TensorBoard if asked."""

import json
import logging
import math
import os
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from align.artifacts import write_json, write_text, writing
from align.errors import DIVERGED, ArtifactError, InvariantError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_log = logging.getLogger(__name__)

_ANEW = "put it back, or start the stage anew with --fresh"
_LOGS = ("metrics.jsonl", "timings.jsonl")


@dataclass(frozen=True)
class Status:
    """How far a stage is, as Tracker.progress writes it. Times are seconds since the epoch."""

    stage: str
    doing: str
    done: int
    total: int
    started: float
    updated: float
    metrics: Mapping[str, float]
    first_done: int = 0  # where the present activity began: not 0 in a resumed run

    @property
    def rate(self) -> float | None:
        """Units a second, of the present activity."""
        elapsed, new = self.updated - self.started, self.done - self.first_done
        return new / elapsed if new > 0 and elapsed > 0 else None

    def seconds_left(self, now: float) -> float | None:
        """Of the present activity; None before its first unit is done."""
        if self.rate is None:
            return None
        return max(0.0, (self.total - self.done) / self.rate - (now - self.updated))


class Tracker:
    """Owns a stage's metrics files and the run's status.json.

    Args:
        folder: the stage's folder in the run.
        stage: its name.
        resume: keep the lines that are there (the stage then calls `rewind`); otherwise start new files.
        tensorboard: also write event files under folder/tensorboard.
    """

    def __init__(self, folder: Path, *, stage: str, resume: bool = False, tensorboard: bool = False) -> None:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._stage = stage
        self._started = time.time()
        self._last_metrics: dict[str, float] = {}
        self._last_write = 0.0
        self._first_done = 0
        self._seen = (0, 0)  # what of the present activity was said last: done, total
        self._resumed: list[tuple[float, float]] = []  # of the kept lines of a resumed stage: when, and seconds
        for name in _LOGS:
            if not resume:
                write_text(folder / name, "")
        self._curves: SummaryWriter | None = None
        if tensorboard:
            with self._going_on_without_curves():
                from torch.utils import tensorboard as writers  # imported only if asked: half a second

                self._curves = writers.SummaryWriter(str(folder / "tensorboard"))

    def settle(self) -> dict[str, int]:
        """Wait until all that was logged is on the disk; returns the number of lines of each file, for `rewind`."""
        lines: dict[str, int] = {}
        for name in _LOGS:
            path = self._folder / name
            with writing(path), path.open("rb+") as file:
                lines[name] = sum(1 for _ in file)
                os.fsync(file.fileno())
        return lines

    def rewind(self, lines: Mapping[str, int]) -> None:
        """Drop all but the first so many lines of each file: what a stopped run did past its last checkpoint is done
        again.

        Raises:
            ArtifactError: a file has fewer, or a line among them is damaged.
        """
        for name in _LOGS:
            path, count = self._folder / name, lines.get(name, 0)
            found = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
            if len(found) < count:
                raise ArtifactError(f"{path} has {len(found)} lines, but {count} when the checkpoint was made; {_ANEW}")
            for number, line in enumerate(found[:count], start=1):
                try:
                    values = cast(dict[str, Any], json.loads(line))
                    seconds = sum(v for key, v in values.items() if key.startswith("seconds/"))
                    self._resumed.append((values.get("time", 0.0), seconds))
                except (ValueError, AttributeError, TypeError) as error:
                    raise ArtifactError(f"{path} line {number} is damaged: {error}; {_ANEW}") from None
            write_text(path, b"".join(line + b"\n" for line in found[:count]).decode())

    def resumed_seconds(self, *, before: float = math.inf) -> float:
        """What the kept lines of a resumed stage took; `before` a time since the epoch, those alone."""
        return sum(seconds for at, seconds in self._resumed if at < before)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line to metrics.jsonl. Raises InvariantError if a value is not finite."""
        bad = {name: value for name, value in metrics.items() if not math.isfinite(value)}
        if bad:
            raise InvariantError(f"{self._stage} step {step}: not finite: {bad}; {DIVERGED}")
        self._append("metrics.jsonl", {"step": step, **metrics})
        self._last_metrics = dict(metrics)
        if self._curves is not None:
            with self._going_on_without_curves():
                for name, value in metrics.items():
                    self._curves.add_scalar(name, value, step)

    def log_timing(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line of clocks (seconds) and memory (bytes) to timings.jsonl."""
        self._append("timings.jsonl", {"step": step, "time": time.time(), **values})

    def progress(self, done: int, total: int, doing: str) -> None:
        """Say how far the present activity is; the driver draws a bar from it. Writes at most 5 times a second."""
        now = time.time()
        if now - self._last_write < 0.2 and done not in (0, total):
            return
        self._last_write = now
        before, self._seen = self._seen, (done, total)
        if done == 0 or total != before[1] or done < before[0]:  # another activity; after a resume not from 0 on
            self._started, self._first_done = now, done
        status = Status(self._stage, doing, done, total, self._started, now, self._last_metrics, self._first_done)
        write_json(self._folder.parent / "status.json", asdict(status), durable=False)

    def close(self) -> None:
        if self._curves is not None:
            with self._going_on_without_curves():
                self._curves.close()

    @contextmanager
    def _going_on_without_curves(self) -> Generator[None]:
        """TensorBoard is a copy of metrics.jsonl: a run is not lost for one that cannot be written."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 # whatever TensorBoard makes of a full disk, or of its own writing thread's end
            self._curves = None
            _log.warning(
                "%s: TensorBoard's files cannot be written (%s); the run goes on without them, all is in metrics.jsonl",
                self._stage,
                error,
            )

    def _append(self, name: str, values: Mapping[str, float]) -> None:
        path = self._folder / name
        with writing(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
