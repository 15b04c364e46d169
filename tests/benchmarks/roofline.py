"""How near each phase of a PPO update comes to what the machine can do, SmolLM2-135M's shape, ppo-update's task.

A share is useful FLOPs (`roofline_flops` has the formulas) over time, by the rate of the best matrix product; decoding
reads every weight for a token of each row, so it is given as a share of memory bandwidth too (a large copy, bytes read
and written). Prefill and decode are those of 16 rows, score and learn those of a micro-batch of 4: score is policy and
value, reference and reward model; learn is forward and backward of policy and value on one trunk. Each with plain
layers and, where the phase calls them, with compiled ones (base.compile), whose compilation is shown and not counted.

A machine that others use drifts within seconds, so the rates are taken before each repeat and after the last, and the
best repeat is held against the best rate of those; all of both are kept. In float32, and in bfloat16 where the
processor multiplies in it.

Bars: learn ≥ 60 % in float32 and ≥ 38 % in bfloat16, with the faster layout; goals 75 % and 60 %.
"""

import gc
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table

from tests.benchmarks.keep import keep
from tests.benchmarks.machine import best_matrix_rate, best_memory_bandwidth
from tests.benchmarks.peer.installation import finish, start
from tests.benchmarks.ppo_update_task import Shape, Task
from tests.benchmarks.roofline_phases import LEARN, Phase, load_roles, phases

REPEATS = 5
CORES = os.cpu_count() or 1
BARS = {"float32": 0.60, "bfloat16": 0.38}
GOALS = {"float32": 0.75, "bfloat16": 0.60}


@dataclass(frozen=True)
class Measured:
    phase: str
    dtype: str
    layers: str  # plain or compiled
    flops: int  # useful, of one repeat
    seconds: list[float]  # of each repeat
    matrix_rates: list[float]  # before each repeat, and after the last
    bytes_read: int | None = None
    bandwidths: tuple[float, ...] = ()

    @property
    def share(self) -> float:
        """Of the best matrix rate."""
        return self.flops / min(self.seconds) / max(self.matrix_rates)

    @property
    def bandwidth_share(self) -> float | None:
        if self.bytes_read is None:
            return None
        return self.bytes_read / min(self.seconds) / max(self.bandwidths)


@dataclass(frozen=True)
class Verdict:
    dtype: str
    layers: str  # of the better one
    share: float
    bar: float
    goal: float

    @property
    def is_held(self) -> bool:
        return self.share >= self.bar


def judge(measured: Sequence[Measured]) -> list[Verdict]:
    """One verdict for each dtype that was measured, of the layout that learns faster."""
    verdicts: list[Verdict] = []
    for dtype in dict.fromkeys(own.dtype for own in measured):
        best = max((own for own in measured if own.phase == LEARN and own.dtype == dtype), key=lambda own: own.share)
        verdicts.append(Verdict(dtype, best.layers, best.share, BARS[dtype], GOALS[dtype]))
    return verdicts


def native_dtypes() -> tuple[str, ...]:
    capabilities = torch.cpu.get_capabilities()
    has_bfloat16 = any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))
    return ("float32", "bfloat16") if has_bfloat16 else ("float32",)


def run(root: Path) -> int:
    """Measure, print and keep; returns the exit code."""
    folder = root.absolute() / "roofline"
    shutil.rmtree(folder, ignore_errors=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")  # empty: compilation is seen whole
    torch.set_num_threads(CORES)
    prepared = folder / "prepared"
    job: dict[str, object] = {"shape": asdict(Shape()), "task": asdict(Task())}
    finish(start("tests.benchmarks.ppo_update_prepare", job, prepared, threads=CORES), prepared)
    measured: list[Measured] = []
    first_passes: dict[str, float] = {}
    for dtype in native_dtypes():
        for layers in ("plain", "compiled"):
            own, seconds = measure_layout(prepared, Shape(), Task(), dtype=dtype, layers=layers)
            measured += own
            first_passes[f"{dtype} {layers}"] = seconds
            gc.collect()  # the model of this layout, before the next one is loaded
    verdicts = judge(measured)
    _print(measured, verdicts, first_passes)
    result = {
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "threads": CORES,
        "shape": asdict(Shape()),
        "task": asdict(Task()),
        "first_passes_seconds": first_passes,
        "measured": [{"share": own.share, "bandwidth_share": own.bandwidth_share, **asdict(own)} for own in measured],
        "verdicts": [{**asdict(verdict), "is_held": verdict.is_held} for verdict in verdicts],
    }
    keep("roofline", result)
    return 0 if all(verdict.is_held for verdict in verdicts) else 1


def measure_layout(
    prepared: Path, shape: Shape, task: Task, *, dtype: str, layers: str
) -> tuple[list[Measured], float]:
    """All phases of one layout, and the seconds that their first passes took together, which compile."""
    roles = load_roles(prepared, task, dtype=dtype, is_compiled=layers == "compiled")
    print(f"{dtype}, {layers} layers: first passes ...", file=sys.stderr, flush=True)
    started = time.perf_counter()
    own = phases(roles, shape, task)
    for phase in own:
        phase.prepare()
        phase.run()
    seconds = time.perf_counter() - started
    return [_measure(phase, dtype, layers) for phase in own], seconds


def _measure(phase: Phase, dtype: str, layers: str) -> Measured:
    print(f"{dtype}, {layers} layers: {phase.name} ...", file=sys.stderr, flush=True)
    seconds: list[float] = []
    rates: list[float] = []
    bandwidths: list[float] = []

    def look_at_the_machine() -> None:
        rates.append(best_matrix_rate(dtype))
        if phase.bytes_read is not None:
            bandwidths.append(best_memory_bandwidth())

    for _ in range(REPEATS):
        look_at_the_machine()
        phase.prepare()
        started = time.perf_counter()
        phase.run()
        seconds.append(time.perf_counter() - started)
    look_at_the_machine()
    return Measured(phase.name, dtype, layers, phase.flops, seconds, rates, phase.bytes_read, tuple(bandwidths))


def _print(measured: Sequence[Measured], verdicts: Sequence[Verdict], first_passes: dict[str, float]) -> None:
    console = Console()
    table = Table("phase", "dtype", "layers", "seconds", "GFLOP/s", "best product", "share", "GB/s", "copy", "share")
    for own in measured:
        best, bandwidth = min(own.seconds), ("", "", "")
        if own.bytes_read is not None and own.bandwidth_share is not None:
            rates = (own.bytes_read / best, max(own.bandwidths))
            bandwidth = (*(f"{rate / 1e9:.1f}" for rate in rates), f"{own.bandwidth_share:.0%}")
        rates = (own.flops / best, max(own.matrix_rates))
        numbers = (*(f"{rate / 1e9:.0f}" for rate in rates), f"{own.share:.0%}")
        seconds = f"{best:.2f} (to {max(own.seconds):.2f})"
        table.add_row(own.phase, own.dtype, own.layers, seconds, *numbers, *bandwidth)
    console.print(table)
    for layout, seconds in first_passes.items():
        console.print(f"first passes, {layout}: {seconds:.0f} s")
    if len(BARS) > len(verdicts):
        console.print("bfloat16 is not native on this machine: its bar is not judged here")
    faced = Table("learn", "layers", "share", "bar", "held", "goal", "of the goal")
    for verdict in verdicts:
        held = "yes" if verdict.is_held else "NO"
        goal = (f"{verdict.goal:.0%}", f"{verdict.share / verdict.goal:.0%}")
        faced.add_row(verdict.dtype, verdict.layers, f"{verdict.share:.1%}", f"{verdict.bar:.0%}", held, *goal)
    console.print(faced)
