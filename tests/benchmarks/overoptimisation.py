"""Is the reward model over-optimised on the quickstart's task, and what does an ensemble of four do there?

Two runs of configs/quickstart.yaml, pushed harder than a user would: no KL penalty, a higher learning rate, more
updates; and on all pairs. They differ in the reward alone: one adapter, or four with mean − λ·std. At each checkpoint
the policy answers the same held-out prompts; gold and the reward that it was trained on are drawn against √KL, as Gao
et al. 2023 do (Scaling Laws for Reward Model Overoptimization). Held if the single model's gold has turned down, its
95 % interval over prompts included, while its own score has risen further.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from math import sqrt
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.table import Table

from align.statistics import bootstrap_interval
from tests.benchmarks.intervals import Interval
from tests.benchmarks.keep import RESULTS, keep
from tests.benchmarks.overoptimisation_looks import SAMPLES, Look

UPDATES, EVERY = 41, 4  # the last checkpoint is after update 40
PRESSURE = [
    "data.reward.train.limit=null",
    "ppo.kl.coefficient=0",
    "ppo.optimizer.learning_rate=2e-4",
    "ppo.rewards.clip=null",
    f"ppo.updates={UPDATES}",
    f"ppo.checkpoints.every={EVERY}",
    f"ppo.checkpoints.keep_last={UPDATES}",
    "cluster.cpus=1",  # both run side by side
]
RUNS = {
    "one": [],
    "ensemble of 4": ["reward.ensemble=4", "ppo.rewards.ensemble=mean-std", "ppo.rewards.ensemble_penalty=1.0"],
}


@dataclass(frozen=True)
class Point:
    update: int
    root_kl: float
    gold: Interval
    score: Interval

    @staticmethod
    def of(look: Look) -> "Point":
        return Point(look.update, sqrt(max(0.0, fmean(look.kls))), _interval(look.golds), _interval(look.scores))


@dataclass(frozen=True)
class Turn:
    """What changed from the look with the highest gold to the last one; paired, answer by answer."""

    peak: int
    last: int
    gold: Interval
    score: Interval

    @property
    def is_overoptimised(self) -> bool:
        return self.gold.high < 0 < self.score.low

    @staticmethod
    def of(looks: list[Look]) -> "Turn":
        peak, last = max(looks, key=lambda look: fmean(look.golds)), looks[-1]

        def change(before: list[float], after: list[float]) -> Interval:
            return _interval([b - a for a, b in zip(before, after, strict=True)])

        return Turn(peak.update, last.update, change(peak.golds, last.golds), change(peak.scores, last.scores))


def run(root: Path) -> int:
    """Train, look, print, plot and keep; returns the exit code."""
    with ThreadPoolExecutor(len(RUNS)) as pool:
        found = pool.map(lambda item: _looks(root.absolute(), *item), RUNS.items())
        looks = dict(zip(RUNS, found, strict=True))
    points = {name: [Point.of(look) for look in own] for name, own in looks.items()}
    turns = {name: Turn.of(own) for name, own in looks.items()}
    _print(points, turns)
    _keep(looks, points, turns)
    plot(points, RESULTS / "overoptimisation.png")
    return 0 if turns["one"].is_overoptimised else 1


def _looks(root: Path, name: str, settings: list[str]) -> list[Look]:
    """Of a run that is made, or gone on with, under `root`; made once for the same run."""
    folder = root / name.replace(" ", "-")
    own = [f"run.root={root}", f"run.name={folder.name}", *PRESSURE, *settings]
    _execute(["align.cli", "run", "configs/quickstart.yaml", *own, "--quiet", "--resume"])
    path = folder / "looks.json"
    if not path.is_file() or path.stat().st_mtime < (folder / "ppo" / "result.json").stat().st_mtime:
        _execute(["tests.benchmarks.overoptimisation_looks", str(folder)])
    return [Look(**look) for look in json.loads(path.read_text(encoding="utf-8"))]


def _execute(module: list[str]) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", *module], check=True, env=environment, stdout=subprocess.DEVNULL)


def _interval(values: list[float]) -> Interval:
    """The mean and its bootstrap interval over prompts."""
    means = [fmean(values[i : i + SAMPLES]) for i in range(0, len(values), SAMPLES)]
    return Interval(fmean(values), *bootstrap_interval(means, seed=0))


def _print(points: dict[str, list[Point]], turns: dict[str, Turn]) -> None:
    for name, own in points.items():
        table = Table("update", "√KL", "gold", "score, SD", title=name)
        for point in own:
            table.add_row(str(point.update), f"{point.root_kl:.2f}", str(point.gold), str(point.score))
        Console().print(table)
    table = Table("reward", "gold is highest after", "gold, from there to the end", "score", "over-optimised")
    for name, turn in turns.items():
        verdict = "yes" if turn.is_overoptimised else "no"
        table.add_row(name, f"update {turn.peak}", str(turn.gold), str(turn.score), verdict)
    Console().print(table)


def _keep(looks: dict[str, list[Look]], points: dict[str, list[Point]], turns: dict[str, Turn]) -> None:
    result = {
        "pressure": PRESSURE,
        "runs": RUNS,
        "points": {name: [asdict(point) for point in own] for name, own in points.items()},
        "turns": {name: asdict(t) | {"is_overoptimised": t.is_overoptimised} for name, t in turns.items()},
        "answers": {  # to the first prompts: before, at the highest gold, at the end
            name: {look.update: look.texts[: 4 * SAMPLES : SAMPLES] for look in own if look.update in shown}
            for (name, own), shown in ((item, (0, turns[item[0]].peak, turns[item[0]].last)) for item in looks.items())
        },
    }
    keep("overoptimisation", result)


def plot(points: dict[str, list[Point]], path: Path) -> None:
    """Gold and the score trained on against √KL, with their intervals."""
    import matplotlib.pyplot as plt
    from matplotlib.figure import Figure

    figure: Figure = plt.figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    for colour, (name, own) in zip(("tab:blue", "tab:orange"), points.items(), strict=True):
        kls = [point.root_kl for point in own]
        for axes, values in zip(panels, ([p.gold for p in own], [p.score for p in own]), strict=True):
            axes.plot(kls, [value.mean for value in values], color=colour, marker=".", label=name)
            axes.fill_between(kls, [v.low for v in values], [v.high for v in values], color=colour, alpha=0.15)
    panels[0].set(xlabel="√KL to the reference, √nats a response", ylabel="gold score")
    panels[1].set(xlabel="√KL to the reference, √nats a response", ylabel="score trained on, standard deviations")
    panels[0].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
