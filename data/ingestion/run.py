"""`ingest`: sources are found and cut into pieces, each piece is sifted, the whole is decided, the data set written."""

import errno
import gc
import os
import re
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import pyarrow as pa

from align.artifacts import write_directory
from align.errors import DataError, StorageError, UsageError, WorkerError
from data.ingestion.decide import decide
from data.ingestion.find import IngestRequest, common_kind, describe, find_pieces
from data.ingestion.rules import RowRules, SetRules
from data.ingestion.sift import Piece, Sifted, sift, with_lines_before
from data.ingestion.write import OnProgress, Tally, write_rows, write_words

Sift = Callable[[Piece], Sifted]
Engine = Callable[[Sift, Sequence[Piece]], Iterable[Sifted]]  # results in any order
# Said of the place that was named, and not of the disk
_NO_PLACE = (errno.ENOTDIR, errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG)


def ingest(
    asked: IngestRequest, to: Path, *, engine: Engine, note: Callable[[str], None], on_progress: OnProgress
) -> dict[str, object]:
    """Make the data set at `to`: whole, or not at all. Returns its account, as in account.json.

    Raises:
        DataError: a source cannot be found, is of no known kind or shape, or no row is fit.
        UsageError: there is something at `to` already, or it cannot be there, or the settings do not fit together.
        StorageError: the disk is full, or fails.
    """
    _verify_free(to)
    scratch = to.absolute().with_name(f".{to.name}.{os.getpid()}.scratch")
    try:
        _clear_what_the_dead_left(to)
        scratch.mkdir(parents=True)
        pieces = find_pieces(asked, scratch, note)
        states = {piece.chunk.path: _state(piece.chunk.path) for piece in pieces}
        is_near_wanted = asked.near_threshold is not None
        rules = RowRules(common_kind(pieces), asked.seed, asked.keep_ties, asked.tokens, is_near_wanted)
        sifted: list[Sifted] = []
        for one in engine(partial(sift, rules=rules), pieces):
            sifted.append(one)
            on_progress("reading", len(sifted), len(pieces))
        sifted.sort(key=lambda one: one.piece.number)
        _warn(sifted, note)
        on_progress("comparing", 0, 1)
        fraction = 0.0 if asked.held_out else asked.held_out_fraction
        decisions = decide(sifted, SetRules(fraction, asked.near_threshold, asked.weights))
        found: list[dict[str, object]] = []

        def fill(folder: Path) -> None:
            tally = write_rows(folder, rules.kind, sifted, decisions, on_progress)
            _verify_unchanged(states)
            _verify_free(to)
            if not tally.kept.total():
                raise DataError(_reasons(tally))
            found.append(write_words(folder, tally, describe(asked, rules.kind, pieces)))

        write_directory(to, fill, kind="dataset", stage="ingest", step=0, base_identity="")
        return found[0]
    except OSError as error:
        if error.filename is not None and f".{to.name}." not in str(error.filename):  # of a source, not of ours
            raise DataError(f"{error.filename} cannot be read: {error.strerror}; look at its permissions") from None
        kind = UsageError if error.errno in _NO_PLACE else StorageError
        raise kind(f"cannot write beside {to}: {error}; free space, or choose another folder") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _verify_free(to: Path) -> None:
    if os.path.lexists(to):
        raise UsageError(f"{to} is there already: ingest into another folder, or remove it first")


def _state(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _verify_unchanged(states: Mapping[Path, tuple[int, int]]) -> None:
    """DataError if a source was written to: rejected rows are read a second time, to be given whole."""
    for path, state in states.items():
        if _state(path) != state:
            raise DataError(f"{path} was changed while it was read; nothing was written. Ingest it again")


def _warn(sifted: Sequence[Sifted], note: Callable[[str], None]) -> None:
    for one, before in with_lines_before(sifted):
        for line, warning in one.warnings:
            note(f"warning: {one.piece.source.name}:{before + line}: {warning}")


def _reasons(tally: Tally) -> str:
    counts = sum(tally.rejected.values(), Counter[str]())
    if not counts:
        return "all sources are empty: there is no row in them"
    told = ", ".join(f"{reason} {count:,}" for reason, count in counts.most_common())
    return f"no row is fit; rejected of {counts.total():,}: {told}. The first: {tally.first}"


def _clear_what_the_dead_left(to: Path) -> None:
    """A killed process leaves its folders behind; that of one that still runs is its own."""
    ours = re.compile(rf"\.{re.escape(to.name)}\.(\d+)\.(scratch|tmp|old)")
    for left in to.parent.iterdir() if to.parent.is_dir() else ():
        found = ours.fullmatch(left.name)
        if found and not Path(f"/proc/{found[1]}").exists():
            shutil.rmtree(left, ignore_errors=True)


def local_engine(processes: int) -> Engine:
    """Processes on this machine; none are started for a single piece."""

    def execute(function: Sift, pieces: Sequence[Piece]) -> Iterator[Sifted]:
        if min(processes, len(pieces)) <= 1:
            yield from map(function, pieces)
            return
        with ProcessPoolExecutor(min(processes, len(pieces)), get_context("spawn"), initializer=_frugal) as pool:
            try:
                with _interrupts_left_to_the_parent():
                    results = pool.map(function, pieces)
                yield from results
            except BrokenProcessPool:
                raise WorkerError("a process that read rows was killed: too little memory? Run again") from None
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    return execute


def _frugal() -> None:
    """Rows are made and dropped by the million, in no cycles: to look for some would take a tenth of the time. And the
    pool that Arrow prefers keeps eight times the memory that a piece's tables need at once."""
    gc.disable()
    pa.set_memory_pool(pa.system_memory_pool())


@contextmanager
def _interrupts_left_to_the_parent() -> Generator[None]:
    """Processes that start in here ignore Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
