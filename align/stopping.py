"""How a run is stopped: what a driver hears, and how it asks its busy worker, by a file in the run's folder, which the
stages look for as they go."""

import os
import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from align.artifacts import writing
from align.errors import StoppedError, TerminatedError

_FILE = ".stop"


def ask_to_stop(run: Path) -> None:
    with writing(run / _FILE):
        (run / _FILE).touch()


def is_asked_to_stop(run: Path) -> bool:
    return (run / _FILE).exists()


def forget_stop(run: Path) -> None:
    with writing(run / _FILE):
        (run / _FILE).unlink(missing_ok=True)


@contextmanager
def heard_signals() -> Generator[None]:
    """Ctrl-C and SIGTERM end what is inside in good order; a Ctrl-C after that ends the process at once."""
    if threading.current_thread() is not threading.main_thread():
        yield  # where no signal comes
        return

    def end_at_once(number: int, frame: object) -> None:
        os._exit(StoppedError.exit_code)

    def end(number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, end_at_once)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # or a second one would break off the good order
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(TerminatedError.exit_code)

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
