"""What ppo-update concludes from its measurements: medians, ratios, and which bars and goals they reach."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from tests.benchmarks.ppo_update_task import Report, Update

TITLES = {
    "trl": "TRL as shipped",
    "trl-lora": "TRL, LoRA critic",
    "head": "ours, critic: head",
    "adapter": "ours, critic: adapter",
    "head-compiled": "ours, critic: head, compiled",
    "adapter-compiled": "ours, critic: adapter, compiled",
}
FLOAT32, BEST = "float32", "best dtype"
COMPILED = "-compiled"  # with base.compile
Variant = tuple[str, str]  # system, dtype


@dataclass(frozen=True)
class Comparison:
    """Ours over TRL's. Without a bar it is shown and not judged."""

    ours: str
    theirs: str
    precision: str  # FLOAT32, or BEST: each side's own
    bar: float | None = None
    goal: float | None = None


SPEED = (  # in episodes a second: at least the bar
    Comparison("head", "trl-lora", FLOAT32, 1.6, 2.2),
    Comparison("head", "trl-lora", BEST, 2.5, 4.0),
    Comparison("adapter", "trl-lora", FLOAT32, 1.1),
    Comparison("adapter", "trl-lora", BEST, 1.8),
    Comparison("head", "trl", FLOAT32, 2.0),
    Comparison("head", "trl", BEST, 3.0, 5.0),
    Comparison("adapter", "trl", FLOAT32),
    Comparison("adapter", "trl", BEST),
)
MEMORY = (  # at the peak, less what imports take: at most the bar
    Comparison("head", "trl", FLOAT32, 0.45),
    Comparison("head", "trl", BEST, 0.35),
    Comparison("adapter", "trl", FLOAT32, 0.45),
    Comparison("adapter", "trl", BEST, 0.35),
    Comparison("head", "trl-lora", FLOAT32),
    Comparison("head", "trl-lora", BEST),
    Comparison("adapter", "trl-lora", FLOAT32),
    Comparison("adapter", "trl-lora", BEST),
)


@dataclass(frozen=True)
class Measured:
    """One system in one dtype, over all its runs."""

    seconds: Update  # medians, each of its own
    spread: tuple[float, float]  # of the whole update: the fastest, the slowest
    episodes_per_second: float
    peak_bytes: int  # the largest
    net_bytes: int  # the largest peak, less that process's imports
    matrix_rate: float  # the best
    optimizer_steps: int

    @staticmethod
    def of(reports: Sequence[Report], episodes: int) -> "Measured":
        updates = [update for report in reports for update in report.updates]
        wholes = [update.whole for update in updates]
        return Measured(
            Update(
                generate=median(update.generate for update in updates),
                score=median(update.score for update in updates),
                learn=median(update.learn for update in updates),
                whole=median(wholes),
            ),
            (min(wholes), max(wholes)),
            episodes / median(wholes),
            max(report.peak_bytes for report in reports),
            max(report.peak_bytes - report.imports_bytes for report in reports),
            max(report.matrix_rate for report in reports),
            reports[0].optimizer_steps,
        )


@dataclass(frozen=True)
class Verdict:
    name: str
    value: float
    bar: float | None
    goal: float | None
    is_held: bool  # True without a bar


def dtypes_to_measure(matrix_rates: Mapping[str, float]) -> tuple[str, ...]:
    """bfloat16 only where the machine computes in it: elsewhere it is emulated, and float32 is the best for all."""
    return (FLOAT32, "bfloat16") if matrix_rates["bfloat16"] > matrix_rates[FLOAT32] else (FLOAT32,)


def fastest(measured: Mapping[Variant, Measured], system: str, precision: str) -> Variant:
    """How this system is the fastest: plain or compiled, in float32 or in its best dtype."""
    return max(
        (
            variant
            for variant in measured
            if variant[0] in (system, system + COMPILED) and (precision == BEST or variant[1] == FLOAT32)
        ),
        key=lambda variant: measured[variant].episodes_per_second,
    )


def judge(measured: Mapping[Variant, Measured]) -> list[Verdict]:
    return [*_speed(measured), *_memory(measured)]


def _speed(measured: Mapping[Variant, Measured]) -> Iterable[Verdict]:
    for pair in SPEED:
        ours, theirs = _sides(measured, pair)
        ratio = theirs.seconds.whole / ours.seconds.whole  # of as many episodes
        is_held = pair.bar is None or ratio >= pair.bar
        yield Verdict(f"episodes/s, {_name(measured, pair)}", ratio, pair.bar, pair.goal, is_held)


def _memory(measured: Mapping[Variant, Measured]) -> Iterable[Verdict]:
    for pair in MEMORY:
        ours, theirs = _sides(measured, pair)
        ratio = ours.net_bytes / theirs.net_bytes
        is_held = pair.bar is None or ratio <= pair.bar
        yield Verdict(f"memory, {_name(measured, pair)}", ratio, pair.bar, pair.goal, is_held)


def _variants(measured: Mapping[Variant, Measured], pair: Comparison) -> tuple[Variant, Variant]:
    return fastest(measured, pair.ours, pair.precision), fastest(measured, pair.theirs, pair.precision)


def _sides(measured: Mapping[Variant, Measured], pair: Comparison) -> tuple[Measured, Measured]:
    ours, theirs = _variants(measured, pair)
    return measured[ours], measured[theirs]


def _name(measured: Mapping[Variant, Measured], pair: Comparison) -> str:
    ours, theirs = _variants(measured, pair)
    dtypes = ours[1] if ours[1] == theirs[1] else f"{ours[1]} over {theirs[1]}"
    precision = "" if pair.precision == FLOAT32 else f"{BEST}: "
    return f"{TITLES[ours[0]]} / {TITLES[theirs[0]]}, {precision}{dtypes}"
