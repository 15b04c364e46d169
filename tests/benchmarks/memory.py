"""One copy of the base against two, three and four of it, SmolLM2-135M's shape: bytes of the models.

The same PPO (the stage function itself, one update of 8 episodes of ppo-update's task, one epoch) with all roles on
one copy of the base; then with the critic, the reward model and the reference in turn on a copy of their own. Each in
a process of its own. What a layout holds is counted when the update ends (`memory_layout`): every tensor that is alive
then, less the optimizer's state.

Bars, for the one copy with the critic as a head, in float32 and bfloat16, and with an adapter of its own: it holds at
most base + adapters + heads, computed from the shape alone, + 2 %; and what the process has grown by since its imports,
beyond all tensors that were counted, is less than half of the base, so that no copy hides from the count.
"""

import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table

from tests.benchmarks.keep import keep
from tests.benchmarks.memory_layout import Report, read_report
from tests.benchmarks.peer.installation import finish, start
from tests.benchmarks.ppo_update_task import Job, Shape, Task
from tests.benchmarks.roofline_flops import Counted

TASK = Task(updates=1, episodes=8, epochs=1)
CORES = os.cpu_count() or 1
SPARE = 1.02  # of what must be held
HIDDEN = 0.5  # of the base
ITEMSIZE = 4  # of adapters and heads, whatever the base's dtype


@dataclass(frozen=True)
class Layout:
    critic: str  # head or adapter
    copies: int
    dtype: str = "float32"  # of the base

    @property
    def title(self) -> str:
        return f"{self.copies}, critic: {self.critic}, {self.dtype}"

    @property
    def name(self) -> str:
        return f"{self.critic}-{self.copies}-{self.dtype}"

    @property
    def adapters(self) -> int:
        """The reference, the reward model and the policy; the critic's own."""
        return 3 if self.critic == "head" else 4


LAYOUTS = (Layout("head", 1, "bfloat16"), Layout("head", 1), *(Layout("adapter", copies) for copies in (1, 2, 3, 4)))


def base_bytes(shape: Shape, dtype: str = "float32") -> int:
    counted = Counted.of(shape, rank=0)
    norms = (2 * shape.layers + 1) * shape.width
    # the head is tied to the embeddings
    return getattr(torch, dtype).itemsize * (counted.weights + counted.head + norms)


def needed_bytes(layout: Layout, shape: Shape, task: Task) -> int:
    """Base + adapters + the heads of reward model and critic."""
    adapter = Counted.of(shape, task.rank).lora
    head = shape.width + 1
    return layout.copies * base_bytes(shape, layout.dtype) + ITEMSIZE * (layout.adapters * adapter + 2 * head)


@dataclass(frozen=True)
class Measured:
    layout: Layout
    report: Report
    base_bytes: int  # of one copy
    needed_bytes: int

    @property
    def held_bytes(self) -> int:
        return self.report.counts.modules + self.report.counts.others

    @property
    def net_peak_bytes(self) -> int:
        return self.report.counts.peak - self.report.imports_bytes

    @property
    def unexplained_bytes(self) -> int:
        counts = self.report.counts
        return counts.resident - self.report.imports_bytes - self.held_bytes - counts.optimizer

    @property
    def is_whole(self) -> bool:
        """It holds what it needs and no more: of several copies, that there are as many."""
        return self.needed_bytes <= self.held_bytes <= SPARE * self.needed_bytes

    @property
    def hides_nothing(self) -> bool:
        return self.unexplained_bytes < HIDDEN * self.base_bytes

    @property
    def is_held(self) -> bool:
        return self.is_whole and self.hides_nothing


def run(root: Path) -> int:
    """Measure, print and keep; returns the exit code. Raises RuntimeError if a layout has not as many copies as it
    says, so that the comparison would be void."""
    folder = root.absolute() / "memory"
    shutil.rmtree(folder, ignore_errors=True)
    prepared = folder / "prepared"
    job: dict[str, object] = {"shape": asdict(Shape()), "task": asdict(TASK)}
    finish(start("tests.benchmarks.ppo_update_prepare", job, prepared, threads=CORES), prepared)
    measured = [measure(layout, folder, prepared, Shape(), TASK) for layout in LAYOUTS]
    wrong = [own.layout.title for own in measured if own.layout.copies > 1 and not own.is_whole]
    _print(measured)
    if wrong:
        raise RuntimeError(f"these layouts do not hold as many copies as they say: {', '.join(wrong)}")
    result = {
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "shape": asdict(Shape()),
        "task": asdict(TASK),
        "measured": [_kept(own) for own in measured],
    }
    keep("memory", result)
    return 0 if all(own.is_held for own in measured if own.layout.copies == 1) else 1


def measure(layout: Layout, folder: Path, prepared: Path, shape: Shape, task: Task) -> Measured:
    print(f"copies of the base: {layout.title} ...", file=sys.stderr, flush=True)
    own = folder / layout.name
    own.mkdir(parents=True)
    (own / "copies.json").write_text(json.dumps(layout.copies), encoding="utf-8")
    job = asdict(Job(layout.critic, layout.dtype, str(prepared), task))
    finish(start("tests.benchmarks.memory_layout", job, own, threads=CORES), own)
    return Measured(layout, read_report(own), base_bytes(shape, layout.dtype), needed_bytes(layout, shape, task))


def _kept(own: Measured) -> dict[str, object]:
    derived = ("held_bytes", "net_peak_bytes", "unexplained_bytes", "is_whole", "hides_nothing", "is_held")
    return {**asdict(own), **{name: getattr(own, name) for name in derived}}


def _print(measured: Sequence[Measured]) -> None:
    ours = next(own for own in measured if own.layout == Layout("adapter", 1))
    titles = (
        "held, MB",
        "needed",
        "over it",
        "over ours",
        "optimizer",
        "unexplained",
        "peak less imports",
        "over ours",
    )
    table = Table("copies of the base", *titles, "held")
    for own in measured:
        sizes = (own.held_bytes, own.needed_bytes)
        others = (own.report.counts.optimizer, own.unexplained_bytes, own.net_peak_bytes)
        verdict = ("yes" if own.is_held else "NO") if own.layout.copies == 1 else ""
        table.add_row(
            own.layout.title,
            *(f"{size / 1e6:.1f}" for size in sizes),
            f"{own.held_bytes / own.needed_bytes:.4f}",
            f"{own.held_bytes / ours.held_bytes:.2f}",
            *(f"{size / 1e6:.0f}" for size in others),
            f"{own.net_peak_bytes / ours.net_peak_bytes:.2f}",
            verdict,
        )
    Console(width=140).print(table)
