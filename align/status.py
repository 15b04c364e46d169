"""How far a run is, read from its folder: for the progress bar while it runs, and for `align status` from elsewhere."""

import fcntl
import json
import os
import socket
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, cast

import yaml

from align.artifacts import clear_leftovers, read_json, write_json, writing
from align.errors import ArtifactError, StorageError, UsageError
from align.stopping import forget_stop
from align.tracking import Status

SILENT_AFTER_SECONDS = 60.0
_LOCK = ".lock"


@dataclass(frozen=True)
class RunState:
    """What `align status` says."""

    state: Literal["not started", "running", "stopped", "finished"]
    finished_steps: tuple[str, ...]
    steps_to_go: tuple[str, ...]
    status: Status | None
    error: str | None


def read_status(run: Path) -> Status | None:
    """None before the first activity, or where another program left something else."""
    try:
        content = cast(dict[str, Any], json.loads((run / "status.json").read_text(encoding="utf-8")))
        return Status(**{name: content[name] for name in Status.__dataclass_fields__ if name in content})
    except (OSError, ValueError, TypeError):
        return None


def read_state(run: Path, now: float) -> RunState:
    """Raises UsageError if there is no run in this folder. A run that has not got past reading its data, or stopped
    there, has no config yet, and so no steps to go."""
    error = _read_end(run)
    try:
        config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        stages = [str(stage) for stage in config["run"]["stages"]]
    except (FileNotFoundError, NotADirectoryError):
        if _is_locked(run):
            return RunState("running", (), (), read_status(run), error)
        if error is not None:
            return RunState("stopped", (), (), read_status(run), error)
        raise UsageError(f"{run}: there is no run in this folder (no config.yaml); give RUN.ROOT/RUN.NAME") from None
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as wrong:
        raise UsageError(f"{run / 'config.yaml'} cannot be read as the config of a run: {wrong}") from None
    steps = [*stages, *(["evaluation"] if "ppo" in stages else [])]
    # One that is run again takes those that were made from its last result with it
    finished = tuple(takewhile(lambda step: (run / step / "result.json").exists(), steps))
    status = read_status(run)
    is_fresh = status is not None and now - status.updated < SILENT_AFTER_SECONDS
    if _is_locked(run):
        state = "running"
    elif len(finished) == len(steps):
        state = "finished"
    elif is_fresh and error is None and _is_driven_elsewhere(run):
        state = "running"
    else:
        state = "stopped" if status is not None or error is not None or finished else "not started"
    return RunState(state, finished, tuple(step for step in steps if step not in finished), status, error)


@contextmanager
def occupied(run: Path) -> Generator[None]:
    """Hold the run folder for one driver; the lock goes with the process, however it ends.

    What a killed one left half-written goes, before and after.

    Raises:
        UsageError: another driver is at work in it, the folder cannot be made, or it cannot be locked.
        StorageError: nothing can be written into it.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        file = (run / _LOCK).open("ab+", buffering=0)
    except OSError as error:
        raise UsageError(f"cannot write into the run folder {run}: {error}; choose another run.root") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            who = file.read().decode(errors="replace").strip() or "pid and host unknown"
            raise UsageError(
                f"{run} is in use by another `align run` ({who}); wait for it, or choose another run.name"
            ) from None
        except OSError as error:
            raise UsageError(
                f"the run folder {run} cannot be locked: {error}; choose a run.root on a file system that has locks"
            ) from None
        with writing(run):
            file.truncate(0)
            file.write(f"pid {os.getpid()} on {socket.gethostname()}\n".encode())
            (run / "stopped.json").unlink(missing_ok=True)
        forget_stop(run)
        clear_leftovers(run)
        try:
            yield
        finally:
            with suppress(StorageError):
                forget_stop(run)
            clear_leftovers(run)


def write_end(run: Path, reason: str) -> None:
    """A word for `align status`; where it cannot be written, what ended the run is what counts."""
    with suppress(StorageError):
        write_json(run / "stopped.json", {"reason": reason})


def _read_end(run: Path) -> str | None:
    try:
        return str(cast(dict[str, object], read_json(run / "stopped.json"))["reason"])
    except (ArtifactError, KeyError, TypeError):
        return None


def _is_driven_elsewhere(run: Path) -> bool:
    """From a machine whose locks we may not see."""
    try:
        who = (run / _LOCK).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return True
    return not who.endswith(f" on {socket.gethostname()}\n")


def _is_locked(run: Path) -> bool:
    try:
        with (run / _LOCK).open("r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except OSError:
        return False
