"""A PPO update of ours against one of TRL 1.12.0's: episodes a second and peak memory, SmolLM2-135M's shape.

Four systems: TRL as shipped and TRL with a LoRA critic (peer/update.py says how they are set), ours with the critic as
a head and with an adapter of its own, each plain and with base.compile (compiling falls into the update that does not
count; bars are judged on the faster). Each runs twice in a process of its own, alone, with all cores as torch's
threads, for three updates of 16 episodes, of which the first does not count; seconds are medians. The second time comes
in the opposite order, for a machine whose speed drifts: what is compared was then measured around the same time. Peak
memory is also given less what is resident once everything is imported and nothing loaded. It takes some 55 minutes; a
machine that other work shares gives other ratios.

In float32; and in bfloat16, too, where the machine's matrix product is faster in it. The best dtype of each system is
the one in which it is the fastest.
"""

import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table

from tests.benchmarks.keep import keep
from tests.benchmarks.machine import best_matrix_rate
from tests.benchmarks.peer.installation import VERSION, finish, install_peer, start
from tests.benchmarks.ppo_update_bars import TITLES, Measured, Variant, Verdict, dtypes_to_measure, judge
from tests.benchmarks.ppo_update_task import Job, Report, Shape, Task, read_report

SYSTEMS = ("trl", "head-compiled", "head", "trl-lora", "adapter-compiled", "adapter")
CORES = os.cpu_count() or 1


def run(root: Path) -> int:
    """Measure, print and keep; returns the exit code. Nothing is gone on from: a comparison is of one run."""
    folder = root.absolute() / "ppo-update"
    shutil.rmtree(folder, ignore_errors=True)
    torch.set_num_threads(CORES)
    rates = {dtype: best_matrix_rate(dtype) for dtype in ("float32", "bfloat16")}
    dtypes = dtypes_to_measure(rates)
    prepared = folder / "prepared"
    job: dict[str, object] = {"shape": asdict(Shape()), "task": asdict(Task())}
    finish(start("tests.benchmarks.ppo_update_prepare", job, prepared, threads=CORES), prepared)
    reports = _reports(folder, prepared, dtypes)
    measured = {variant: Measured.of(own, Task.episodes) for variant, own in reports.items()}
    verdicts = judge(measured)
    _print_measured(measured, rates)
    _print_verdicts(verdicts)
    result = {
        "versions": {"trl": VERSION, "torch": torch.__version__, "transformers": transformers.__version__},
        "matrix_rates": rates,
        "shape": asdict(Shape()),
        "task": asdict(Task()),
        "measured": {" ".join(variant): asdict(own) for variant, own in measured.items()},
        "verdicts": [asdict(verdict) for verdict in verdicts],
        "reports": {" ".join(variant): [asdict(report) for report in own] for variant, own in reports.items()},
    }
    keep("ppo-update", result)
    return 0 if all(verdict.is_held for verdict in verdicts) else 1


def _reports(folder: Path, prepared: Path, dtypes: tuple[str, ...]) -> dict[Variant, list[Report]]:
    peer = install_peer()
    reports: dict[Variant, list[Report]] = {}
    for dtype in dtypes:
        for number, system in enumerate((*SYSTEMS, *reversed(SYSTEMS))):
            print(f"{TITLES[system]}, {dtype} ...", file=sys.stderr, flush=True)
            job = asdict(Job(system, dtype, str(prepared)))
            own = folder / f"{dtype}-{number}"
            if system.startswith("trl"):
                process = start("tests.benchmarks.peer.update", job, own, peer=peer, threads=CORES)
            else:
                process = start("tests.benchmarks.ppo_update_ours", job, own, threads=CORES)
            finish(process, own)
            reports.setdefault((system, dtype), []).append(read_report(own))
    return reports


def _print_measured(measured: Mapping[Variant, Measured], rates: Mapping[str, float]) -> None:
    console = Console()
    products = ", ".join(f"{dtype} {rate / 1e9:.0f} GFLOP/s" for dtype, rate in rates.items())
    console.print(f"best matrix product with {CORES} threads: {products}")
    if len(dtypes_to_measure(rates)) == 1:
        console.print("bfloat16 is not native on this machine: float32 is the best dtype of both sides")
    times = Table("", "dtype", "episodes/s", "seconds", "generate", "score", "learn")
    others = Table("", "dtype", "peak memory, GB", "less imports", "optimizer steps", "best product, GFLOP/s")
    for (system, dtype), own in measured.items():
        name = (TITLES[system], dtype)
        phases = (own.seconds.generate, own.seconds.score, own.seconds.learn)
        whole = f"{own.seconds.whole:.1f} ({own.spread[0]:.1f}–{own.spread[1]:.1f})"
        times.add_row(*name, f"{own.episodes_per_second:.3f}", whole, *(f"{seconds:.1f}" for seconds in phases))
        memory = (f"{size / 1e9:.2f}" for size in (own.peak_bytes, own.net_bytes))
        others.add_row(*name, *memory, str(own.optimizer_steps), f"{own.matrix_rate / 1e9:.0f}")
    console.print(times)
    console.print(others)


def _print_verdicts(verdicts: list[Verdict]) -> None:
    table = Table("ours / TRL", "ratio", "bar", "held", "goal", "of the goal")
    for verdict in verdicts:
        bar = ("", "") if verdict.bar is None else (f"{verdict.bar:g}", "yes" if verdict.is_held else "NO")
        goal = ("", "") if verdict.goal is None else (f"{verdict.goal:g}", f"{verdict.value / verdict.goal:.0%}")
        table.add_row(verdict.name, f"{verdict.value:.2f}", *bar, *goal)
    Console().print(table)
