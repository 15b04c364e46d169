"""How time and memory of a PPO update grow with episodes, response length, depth, and adapters; SmolLM2-135M's shape.

One thing at a time is changed from the same point: 8 episodes of 32 + 32 tokens, all 30 layers, rank 16 in all of them,
one reward model, the critic as a head; micro-batches of 4, 2 epochs, float32. Each point is a process of its own with
two updates, of which the second counts; peak memory is given less what imports take. Where only the last layers carry
adapters, those below are computed once a batch and not in each role and epoch (`align.layers`): what that saves is the
difference to the same run without that cache.

The exit code is 1 if time grows clearly more than linearly in episodes: more than 1.3 times as fast from one point to
the next.
"""

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table

from tests.benchmarks.keep import keep
from tests.benchmarks.peer.installation import finish, start
from tests.benchmarks.ppo_update_prepare import prepare
from tests.benchmarks.ppo_update_task import Job, Report, Shape, Task, read_report

CORES = os.cpu_count() or 1
TOLERANCE = 1.3  # of linear growth
EPISODES = "episodes"
SHAPE = Shape()
TASK = Task(updates=2, episodes=8, prompt_length=32, response_length=32, epochs=2, minibatches=1)


@dataclass(frozen=True)
class Point:
    axis: str
    value: float  # of what is changed
    shape: Shape = SHAPE
    task: Task = TASK
    is_cached: bool = True

    @property
    def title(self) -> str:
        return f"{self.axis} {self.value:g}" + ("" if self.is_cached else ", no cache")

    @property
    def setting(self) -> tuple[Shape, Task, bool]:
        """What is run: axes share the point that they start from."""
        return self.shape, self.task, self.is_cached


def points() -> list[Point]:
    layers = SHAPE.layers
    depths = (layers // 3, 2 * layers // 3, layers)
    tasks = {
        EPISODES: [(n, replace(TASK, episodes=n)) for n in (4, 8, 16)],
        "response length": [(n, replace(TASK, response_length=n)) for n in (16, 32, 64)],
        "rank": [(n, replace(TASK, rank=n)) for n in (8, 16, 32)],
        "reward models": [(n, replace(TASK, reward_models=n)) for n in (1, 2, 4)],
    }
    last = {n: replace(TASK, adapted_layers=n) for n in (layers // 3, layers // 10)}
    return [
        *(Point(axis, value, task=task) for axis, changed in tasks.items() for value, task in changed),
        *(Point("depth", depth, shape=replace(SHAPE, layers=depth)) for depth in depths),
        Point("layers with adapters", layers),
        *(Point("layers with adapters", n, task=task, is_cached=c) for n, task in last.items() for c in (True, False)),
    ]


def growth(seconds: Mapping[float, float]) -> list[float]:
    """How much faster than linearly time grows from each size to the next; 1 is linear."""
    sizes = sorted(seconds)
    return [seconds[larger] / seconds[size] * size / larger for size, larger in pairwise(sizes)]


def run(root: Path) -> int:
    """Measure, print and keep; returns the exit code."""
    folder = root.absolute() / "scaling"
    shutil.rmtree(folder, ignore_errors=True)
    reports: dict[tuple[Shape, Task, bool], Report] = {}
    for point in points():
        if point.setting not in reports:
            print(f"{point.title} ...", file=sys.stderr, flush=True)
            reports[point.setting] = measure(point, folder / str(len(reports)))
    measured = [(point, reports[point.setting]) for point in points()]
    by_episodes = {point.value: report.updates[0].whole for point, report in measured if point.axis == EPISODES}
    factors = growth(by_episodes)
    is_linear = max(factors) <= TOLERANCE
    _print(measured)
    grown = ", ".join(f"{factor:.2f}" for factor in factors)
    print(f"growth in episodes, over linear: {grown} (at most {TOLERANCE}): {'held' if is_linear else 'NOT held'}")
    result = {
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "shape": asdict(SHAPE),
        "task": asdict(TASK),
        "growth_in_episodes_over_linear": factors,
        "is_linear": is_linear,
        "points": [_kept(point, report) for point, report in measured],
    }
    keep("scaling", result)
    return 0 if is_linear else 1


def measure(point: Point, folder: Path) -> Report:
    prepared = folder / "prepared"
    prepare(prepared, point.shape, point.task)
    module = "ppo_update_ours" if point.is_cached else "scaling_uncached"
    job = asdict(Job("head", "float32", str(prepared), point.task))
    finish(start(f"tests.benchmarks.{module}", job, folder, threads=CORES), folder)
    shutil.rmtree(prepared)  # half a gigabyte each
    return read_report(folder)


def _kept(point: Point, report: Report) -> dict[str, object]:
    values = {"axis": point.axis, "value": point.value, "is_cached": point.is_cached}
    return {**values, "net_peak_bytes": report.peak_bytes - report.imports_bytes, **asdict(report)}


def _print(measured: Sequence[tuple[Point, Report]]) -> None:
    start_point = Point("", 0)
    first = next(report for point, report in measured if point.setting == start_point.setting)
    titles = (
        "seconds",
        "generate",
        "score",
        "learn",
        "over the start",
        "peak less imports, MB",
        "best product, GFLOP/s",
    )
    table = Table("", *titles)
    axis = ""
    for point, report in measured:
        if axis not in ("", point.axis):
            table.add_section()
        axis, seconds = point.axis, report.updates[0]
        table.add_row(
            point.title,
            *(f"{value:.2f}" for value in (seconds.whole, seconds.generate, seconds.score, seconds.learn)),
            f"{seconds.whole / first.updates[0].whole:.2f}",
            f"{(report.peak_bytes - report.imports_bytes) / 1e6:.0f}",
            f"{report.matrix_rate / 1e9:.0f}",
        )
    Console().print(table)
