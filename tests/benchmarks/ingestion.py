"""`align ingest` against what TRL does with the same file of 104,040 HH-RLHF-shaped pairs, in one run on one machine.

Each is measured in a process of its own, from its start to its end, with the memory of all its processes together:
TRL's load_dataset and map(extract_prompt), ours with exact deduplication, ours with near deduplication as well. The
three take turns, twice; the faster of both counts, and the larger memory. Apart from these, with no bar: TRL's map in
as many processes as there are cores, and ours with token lengths; for its memory alone, ours on ten times the pairs.

TRL's reader stops at the first malformed line. So it gets the file without them, and is spared them.
"""

import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypedDict, cast

from rich.console import Console
from rich.table import Table

from tests.benchmarks import hh_shaped
from tests.benchmarks.hh_shaped import Planted
from tests.benchmarks.keep import keep
from tests.benchmarks.process_tree import Measured, measure

REPEATS = 2
CORES = os.cpu_count() or 1
NEAR = ["--near", "0.8"]
NEAR_REASONS = ("near duplicate", "prompt is nearly held out")  # the second: of a row whose double is held out
TOKENS = ["--tokenizer", "embedded", "--max-length", "1024"]
SPEED_BAR, SPEED_GOAL = 2.0, 5.0
MEMORY_BAR = 500e6  # bytes
RECALL_BAR = 0.95


class Account(TypedDict):
    rows_in: int
    kept: int
    rejected: dict[str, int]


@dataclass(frozen=True)
class Timing:
    """One way of reading the file, over its repeats."""

    name: str
    pairs: int
    seconds: float  # the least
    peak_rss_bytes: int  # the most
    all_seconds: list[float]

    @staticmethod
    def of(name: str, pairs: int, measured: list[Measured]) -> "Timing":
        seconds = [one.seconds for one in measured]
        return Timing(name, pairs, min(seconds), max(one.peak_rss_bytes for one in measured), seconds)


@dataclass(frozen=True)
class Bar:
    name: str
    value: str
    is_held: bool


class Bench:
    """The files under `root`, and the processes that read them."""

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()
        self._root.mkdir(parents=True, exist_ok=True)
        self.measured: dict[str, list[Measured]] = {}
        self.accounts: dict[str, Account] = {}

    def file(self, name: str, pairs: int = hh_shaped.PAIRS, *, malformed: bool = True) -> tuple[Path, Planted]:
        path = self._root / name
        return path, hh_shaped.write(path, pairs, malformed=malformed)

    def trl(self, name: str, file: Path, processes: int = 1) -> None:
        cache = self._fresh(name)
        command = [sys.executable, "-m", "tests.benchmarks.ingestion_trl", str(file), str(cache / "cache")]
        offline = {"HF_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
        self._measure(name, [*command, str(processes)], cache, offline)
        shutil.rmtree(cache)

    def align(self, name: str, file: Path, options: list[str]) -> None:
        folder = self._fresh(name)
        command = [sys.executable, "-m", "align.cli", "ingest", str(file), "--to", str(folder / "out"), "--quiet"]
        self._measure(name, command + options, folder, {})
        account = cast(Account, json.loads((folder / "out" / "account.json").read_text(encoding="utf-8")))
        if self.accounts.setdefault(name, account) != account:
            raise RuntimeError(f"{name}: the repeats have different accounts: {self.accounts[name]}, {account}")
        shutil.rmtree(folder)

    def _fresh(self, name: str) -> Path:
        folder = self._root / name
        shutil.rmtree(folder, ignore_errors=True)
        return folder

    def _measure(self, name: str, command: list[str], folder: Path, environment: dict[str, str]) -> None:
        print(f"{name} ...", file=sys.stderr, flush=True)
        measured = measure(command, folder, environment=os.environ | environment)
        self.measured.setdefault(name, []).append(measured)


def run(root: Path) -> int:
    """Write the files, take the times, print and keep them; returns the exit code."""
    bench = Bench(root)
    file, planted = bench.file("pairs.jsonl")
    parsable, parsable_planted = bench.file("parsable.jsonl", malformed=False)
    for _ in range(REPEATS):
        bench.trl("trl", parsable)
        bench.align("exact", file, [])
        bench.align("near", file, NEAR)
    bench.trl("trl-parallel", parsable, processes=CORES)
    bench.align("tokens", file, TOKENS)
    file.unlink()
    large, large_planted = bench.file("ten-times.jsonl", 10 * hh_shaped.PAIRS)
    bench.align("exact-ten-times", large, [])
    large.unlink()

    pairs = dict.fromkeys(("trl", "trl-parallel"), parsable_planted) | {"exact-ten-times": large_planted}
    timings = {name: Timing.of(name, pairs.get(name, planted).pairs, all) for name, all in bench.measured.items()}
    of_trl = [float(json.loads(one.stdout)["seconds"]) for one in bench.measured["trl"]]
    bars = speed_bars(timings) + memory_bars(timings) + account_bars(planted, bench.accounts)
    notes = {
        "trl_seconds_without_imports": min(of_trl),
        "trl_without_imports_over_exact": min(of_trl) / timings["exact"].seconds,
        "trl_parallel_over_exact": timings["trl-parallel"].seconds / timings["exact"].seconds,
        "speed_goal": SPEED_GOAL,
    }
    _print(timings, bars, notes)
    result = {
        "planted": asdict(planted),
        "timings": [asdict(timing) for timing in timings.values()],
        "notes": notes,
        "accounts": {name: {key: own[key] for key in Account.__annotations__} for name, own in bench.accounts.items()},
        "bars": [asdict(bar) for bar in bars],
    }
    keep("ingestion", result)
    return 0 if all(bar.is_held for bar in bars) else 1


def speed_bars(timings: dict[str, Timing]) -> list[Bar]:
    trl, exact, near = (timings[name].seconds for name in ("trl", "exact", "near"))
    return [
        Bar(f"exact: at least {SPEED_BAR:g} × as fast as TRL (goal: {SPEED_GOAL:g})", f"{trl / exact:.2f} ×",
            trl >= SPEED_BAR * exact),
        Bar("near: adds at most what TRL takes", f"{(near - exact) / trl:.2f} of it", near - exact <= trl),
    ]  # fmt: skip


def memory_bars(timings: dict[str, Timing]) -> list[Bar]:
    peaks = {name: timings[name].peak_rss_bytes for name in ("exact", "exact-ten-times")}
    return [
        Bar(f"{name}: peak memory ≤ {MEMORY_BAR / 1e6:.0f} MB", f"{peak / 1e6:.0f} MB", peak <= MEMORY_BAR)
        for name, peak in peaks.items()
    ]


def account_bars(planted: Planted, accounts: dict[str, Account]) -> list[Bar]:
    """Every row accounted for, the planted defects found, and no clean row taken for one."""
    bars: list[Bar] = []
    for name in ("exact", "near"):
        account = accounts[name]
        found = {reason: count for reason, count in account["rejected"].items() if reason not in NEAR_REASONS}
        is_whole = account["rows_in"] == planted.pairs == account["kept"] + sum(account["rejected"].values())
        bars.append(Bar(f"{name}: the rows add up", f"{account['rows_in']} in, {account['kept']} kept", is_whole))
        wrong = {
            reason: f"{found.get(reason, 0)}, not {planted.rejected.get(reason, 0)}"
            for reason in sorted(found | planted.rejected)
            if found.get(reason) != planted.rejected.get(reason)
        }
        bars.append(Bar(f"{name}: the planted defects are found", str(wrong or "all, exactly"), not wrong))
    unasked, near = (
        sum(accounts[name]["rejected"].get(reason, 0) for reason in NEAR_REASONS) for name in ("exact", "near")
    )
    bars.append(Bar("exact: near duplicates are kept", f"{unasked} rejected", unasked == 0))
    # No two rows are alike but those planted: more of them would be clean rows lost, and would flatter the recall.
    is_held = RECALL_BAR * planted.near_duplicates <= near <= planted.near_duplicates
    bars.append(
        Bar(
            f"near: {RECALL_BAR:.0%} of the near duplicates, and nothing else",
            f"{near} of {planted.near_duplicates}",
            is_held,
        )
    )
    return bars


def _print(timings: dict[str, Timing], bars: list[Bar], notes: dict[str, float]) -> None:
    table = Table("", "pairs", "seconds", "pairs a second", "peak memory, MB")
    for timing in timings.values():
        rate, peak = timing.pairs / timing.seconds, timing.peak_rss_bytes / 1e6
        table.add_row(timing.name, f"{timing.pairs:,}", f"{timing.seconds:.1f}", f"{rate:,.0f}", f"{peak:.0f}")
    Console().print(table)
    table = Table("bar", "seen", "held")
    for bar in bars:
        table.add_row(bar.name, bar.value, "yes" if bar.is_held else "NO")
    Console().print(table)
    for name, value in notes.items():
        Console().print(f"{name}: {value:.2f}")
