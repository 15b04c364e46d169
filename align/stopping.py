"""How a run is stopped: what a driver hears, and how it asks its busy worker, by a file in the run's folder, which the
stages look for as they go."""

import os
import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

from align.artifacts import writing
from align.errors import StoppedError, TerminatedError

_FILE = ".stop"
_LAST_SECONDS = 15.0  # of good order; twice as long as it takes


def ask_to_stop(run: Path) -> None:
    with writing(run / _FILE):
        (run / _FILE).touch()


def is_asked_to_stop(run: Path) -> bool:
    return (run / _FILE).exists()


def forget_stop(run: Path) -> None:
    with writing(run / _FILE):
        (run / _FILE).unlink(missing_ok=True)


@contextmanager
def heard_signals(give_up: Callable[[str], None] = lambda why: None) -> Generator[None]:
    """Ctrl-C and SIGTERM end what is inside in good order; a Ctrl-C after that ends the process at once.

    Where all processes of a job are told to end, Ray's are gone before us, and calls to them would wait for a minute:
    after some seconds the process ends without them. `give_up` is to say why it ends, wherever it is not in good order.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # where no signal comes
        return

    def end_at_once(number: int, frame: object) -> None:
        try:
            give_up("ended at once by a second Ctrl-C")
        finally:
            os._exit(StoppedError.exit_code)

    is_inside = True

    def end_anyway(code: int) -> None:
        if is_inside:
            give_up("ended without Ray, which does not answer")
        if is_inside or not threading.main_thread().is_alive():  # or other code of this process goes on
            os._exit(code)

    def end(number: int, frame: object) -> None:
        code = (StoppedError if number == signal.SIGINT else TerminatedError).exit_code
        last = threading.Timer(_LAST_SECONDS, end_anyway, [code])
        last.daemon = True
        last.start()
        signal.signal(signal.SIGINT, end_at_once)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # or a second one would break off the good order
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(code)

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        is_inside = False
        for number, handler in before.items():
            signal.signal(number, handler)
