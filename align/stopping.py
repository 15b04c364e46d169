"""How a driver asks its busy worker to stop: by a file in the run's folder, which the stages look for as they go."""

from pathlib import Path

from align.artifacts import writing

_FILE = ".stop"


def ask_to_stop(run: Path) -> None:
    with writing(run / _FILE):
        (run / _FILE).touch()


def is_asked_to_stop(run: Path) -> bool:
    return (run / _FILE).exists()


def forget_stop(run: Path) -> None:
    with writing(run / _FILE):
        (run / _FILE).unlink(missing_ok=True)
