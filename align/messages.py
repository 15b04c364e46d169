"""What the worker has to say to the user: a file that the worker appends to and the driver reads while it waits.

Only messages of our own packages pass; those of libraries stay in Ray's logs.
"""

import faulthandler
import logging
import os
import re
import warnings
from pathlib import Path
from typing import TextIO

from align.installation import PACKAGES

_FILE = "messages.log"
_STDERR = "worker.log"
_LAST_WORDS = 300  # characters


class MessageReader:
    """Owns the driver's place in the file; what was there before is not repeated."""

    def __init__(self, run: Path) -> None:
        self._path = run / _FILE
        self._offset = self._path.stat().st_size if self._path.exists() else 0

    def read_new(self) -> list[str]:
        """The whole lines that came since the last call."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._offset += len(whole)
        return whole.decode(errors="replace").splitlines()


def write_messages(run: Path, import_root: Path) -> None:
    """Send this process's own log records and warnings to the run's messages.log from now on."""
    run.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(run / _FILE, encoding="utf-8")
    handler.setFormatter(_OneLine())
    for package in PACKAGES:
        logger = logging.getLogger(package)
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)
    folders = tuple(f"{import_root / package}/" for package in PACKAGES)
    show_elsewhere = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if filename.startswith(folders):
            logging.getLogger("align").warning(str(message))
        else:
            show_elsewhere(message, category, filename, lineno, file, line)

    warnings.showwarning = show


def keep_stderr(run: Path) -> None:
    """Send what this process writes to stderr, a crash's trace among it, to the run's worker.log from now on."""
    with (run / _STDERR).open("wb") as file:
        os.dup2(file.fileno(), 2)
    faulthandler.enable(2)


def last_words(run: Path) -> str:
    """The end of worker.log on one line, without control characters; empty if there is none."""
    path = run / _STDERR
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    plain = re.sub(r"\x1b\[[0-9;]*[A-Za-z]|[\x00-\x1f\x7f-\x9f]", " ", text)
    return " ".join(plain.split())[-_LAST_WORDS:]


class _OneLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = " ".join(record.getMessage().split())
        return f"{record.levelname.lower()}: {text}" if record.levelno >= logging.WARNING else text
