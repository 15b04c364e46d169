"""The quickstart over three seeds, as a user runs it, held against its bars."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.table import Table

from tests.benchmarks.keep import keep

SEEDS = (0, 1, 2)
Summary = dict[str, dict[str, float]]
# name, what is read off one seed's summary, the bar for the mean over seeds, the bar for every seed
Bar = tuple[str, Callable[[Summary], float], Callable[[float], bool] | None, Callable[[float], bool] | None]


def _low(interval: object) -> float:
    assert isinstance(interval, list)
    return float(interval[0])


BARS: dict[str, Bar] = {
    "gold gain ≥ 0.15 (mean)": ("gold_gain", lambda s: s["eval"]["gold_gain"], lambda x: x >= 0.15, None),
    "its interval above 0": ("gold_gain low", lambda s: _low(s["eval"]["gold_gain_ci95"]), None, lambda x: x > 0),
    "reward accuracy ≥ 0.70": ("accuracy", lambda s: s["reward"]["accuracy"], None, lambda x: x >= 0.70),
    "held-out pairs ≥ 200": ("pairs", lambda s: s["reward"]["held_out_pairs"], None, lambda x: x >= 200),
    "accuracy's interval above the length baseline": (
        "accuracy low − baseline",
        lambda s: _low(s["reward"]["accuracy_ci95"]) - s["reward"]["length_baseline_accuracy"],
        None,
        lambda x: x > 0,
    ),
    "KL ≤ 20 nats a response": ("kl", lambda s: s["eval"]["kl"], None, lambda x: x <= 20),
    "NLL ratio ≤ 1.3": ("nll_ratio", lambda s: s["eval"]["nll_ratio"], None, lambda x: x <= 1.3),
    "distinct-2 ratio ≥ 0.8": ("distinct2_ratio", lambda s: s["eval"]["distinct2_ratio"], None, lambda x: x >= 0.8),
    "EOS rate ≥ 0.9": ("eos_rate", lambda s: s["eval"]["eos_rate"], None, lambda x: x >= 0.9),
    "base loaded once": ("loads", lambda s: s["base"]["loads"], None, lambda x: x == 1),
    "checkpoints ≤ 3 % of PPO's time": (
        "checkpoint share",
        lambda s: s["checkpoints"]["share"],
        None,
        lambda x: x <= 0.03,
    ),
    "minutes < 8": ("minutes", lambda s: s["seconds"]["install_excluded_total"] / 60, None, lambda x: x < 8),
}


def checkpoint_share(timings: Path) -> float:
    """Of the time of PPO's updates with a checkpoint after each, what the checkpoints took.

    A line holds what its update took and the checkpoint of the update before; after the last there is none.
    """
    lines = [json.loads(line) for line in timings.read_text().splitlines()]
    total = sum(value for line in lines for name, value in line.items() if name.startswith("seconds/"))
    return sum(line["seconds/checkpoint"] for line in lines) / total


def run(root: Path) -> int:
    """Run the seeds one after another under `root`; returns the exit code."""
    summaries: list[Summary] = []
    for seed in SEEDS:
        print(f"seed {seed} ...", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "align.cli", "run", "configs/quickstart.yaml", f"run.root={root.absolute()}"]
        command += [f"run.name=seed-{seed}", f"run.seed={seed}", "--json", "--quiet", "--resume"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        share = checkpoint_share(root / f"seed-{seed}" / "ppo" / "timings.jsonl")
        summaries.append({**json.loads(done.stdout), "checkpoints": {"share": share}})
    table = Table("bar", *(f"seed {seed}" for seed in SEEDS), "mean", "held")
    missed = 0
    rows = {}
    for title, (name, read, mean_bar, seed_bar) in BARS.items():
        values = [read(summary) for summary in summaries]
        held = mean_bar(fmean(values)) if mean_bar else all(seed_bar(v) for v in values) if seed_bar else True
        missed += not held
        rows[title] = {"name": name, "seeds": values, "mean": fmean(values), "held": held}
        table.add_row(title, *(f"{v:.3f}" for v in values), f"{fmean(values):.3f}", "yes" if held else "NO")
    Console().print(table)
    result = {"rows": rows, "summaries": summaries}
    keep("quickstart", result)
    return 1 if missed else 0
