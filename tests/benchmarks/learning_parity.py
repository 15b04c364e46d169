"""Does our PPO learn as well as TRL 1.12.0's? The same model, reward, prompts and hyperparameters; ten seeds a system.

Judged by fresh answers to held-out prompts: ours is not inferior if the 95 % interval of (ours − TRL) lies above minus
5 % of the reward's range, at equal episodes and at matched KL. The bar is for the critic that is the counterpart of
TRL's, with an adapter of its own: in float32, as TRL, and with the fast settings, in bfloat16 and with compiled layers.
Beside it: the critic that is a head on the policy's trunk, and both with λ = 1.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
from rich.console import Console
from rich.table import Table

from tests.benchmarks.intervals import Interval, difference_interval, mean_interval
from tests.benchmarks.keep import RESULTS, keep
from tests.benchmarks.parity_evaluation import Outcome, evaluate, evaluated
from tests.benchmarks.parity_ours import FAST, LAM1
from tests.benchmarks.parity_recipe import Job, Point, Recipe
from tests.benchmarks.parity_task import find_model
from tests.benchmarks.peer.installation import VERSION, finish, install_peer, start

SEEDS = tuple(range(10))
# Our two critics, each a system of its own; with λ = 1; and one with the fast settings
OURS = ("adapter", "adapter-fast", "head", "adapter-lam1", "head-lam1")
BARRED = ("adapter", "adapter-fast")
SYSTEMS = ("trl", *OURS)
PROCESSES = 2  # of one thread each
MARGIN = 0.05  # of the reward's range, which is 1
SMOOTHING = 5  # updates


@dataclass(frozen=True)
class Run:
    outcome: Outcome
    curve: list[Point]


@dataclass(frozen=True)
class Verdict:
    """Ours less TRL's reward."""

    equal_episodes: Interval
    matched_kl: float
    at_matched_kl: Interval

    @property
    def held(self) -> bool:
        return min(self.equal_episodes.low, self.at_matched_kl.low) > -MARGIN


def run(root: Path) -> int:
    """Train, evaluate, print, plot and keep; returns the exit code."""
    model = str(find_model())
    jobs = [Job(system, seed, model) for seed in SEEDS for system in SYSTEMS]
    with ThreadPoolExecutor(PROCESSES) as pool:
        list(pool.map(lambda job: _train(job, _folder(root, job)), jobs))
    base = evaluate(jobs[0], None)
    runs = {name: [_read(job, _folder(root, job)) for job in jobs if job.system == name] for name in SYSTEMS}
    verdicts = {name: compare(runs[name], runs["trl"]) for name in OURS}
    _print(runs, base, verdicts)
    _keep(runs, base, verdicts)
    plot(runs, RESULTS / "learning-parity.png")
    return 0 if all(verdicts[name].held for name in BARRED) else 1


def _folder(root: Path, job: Job) -> Path:
    return root / "learning-parity" / f"{job.system}-{job.seed}"


def _train(job: Job, folder: Path) -> None:
    """Unless a run of this very job is there."""
    path = folder / "result.json"
    same_job = json.loads(json.dumps(asdict(job)))
    if path.is_file() and json.loads(path.read_text(encoding="utf-8"))["job"] == same_job:
        return
    (folder / "evaluation.json").unlink(missing_ok=True)
    is_peer = job.system == "trl"
    module = "tests.benchmarks.peer.train" if is_peer else "tests.benchmarks.parity_ours"
    finish(start(module, asdict(job), folder, peer=install_peer() if is_peer else None), folder)


def _read(job: Job, folder: Path) -> Run:
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return Run(evaluated(job, folder), [Point(**point) for point in result["curve"]])


def compare(ours: list[Run], theirs: list[Run]) -> Verdict:
    """The matched KL is the smaller of the two systems' final KLs, so that both learning curves reach it."""
    final = [[run.outcome.reward for run in runs] for runs in (ours, theirs)]
    kl = min(fmean(run.outcome.kl for run in runs) for runs in (ours, theirs))
    matched = [[reward_at_kl(run.curve, kl) for run in runs] for runs in (ours, theirs)]
    return Verdict(difference_interval(*final), kl, difference_interval(*matched))


def reward_at_kl(curve: list[Point], kl: float) -> float:
    """The reward where a run's learning curve first reaches this KL, both smoothed over some updates; its last reward
    if it never does."""
    kls, rewards = smoothed([point.kl for point in curve]), smoothed([point.reward for point in curve])
    for i in range(1, len(kls)):
        if kls[i] >= kl:
            share = (kl - kls[i - 1]) / (kls[i] - kls[i - 1]) if kls[i] > kls[i - 1] else 1.0
            return rewards[i - 1] + max(0.0, share) * (rewards[i] - rewards[i - 1])
    return rewards[-1]


def smoothed(values: list[float]) -> list[float]:
    """Centred means, over fewer values at both ends."""
    half = SMOOTHING // 2
    return [fmean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def _print(runs: dict[str, list[Run]], base: Outcome, verdicts: dict[str, Verdict]) -> None:
    table = Table("system", "reward", "KL, nats", "EOS rate", "tokens")
    table.add_row("base", f"{base.reward:.3f}", "0", f"{base.eos_rate:.2f}", f"{base.length:.1f}")
    for name, of_system in runs.items():
        outcomes = [run.outcome for run in of_system]
        reward, kl = (mean_interval([getattr(o, field) for o in outcomes]) for field in ("reward", "kl"))
        ends, length = (fmean(getattr(o, field) for o in outcomes) for field in ("eos_rate", "length"))
        table.add_row(_title(name), str(reward), str(kl), f"{ends:.2f}", f"{length:.1f}")
    Console().print(table)
    table = Table("ours − TRL", "at equal episodes", "at matched KL", f"above −{MARGIN}")
    for name, verdict in verdicts.items():
        matched = f"{verdict.at_matched_kl} at {verdict.matched_kl:.1f} nats"
        table.add_row(_title(name), str(verdict.equal_episodes), matched, "yes" if verdict.held else "NO")
    Console().print(table)


def _title(system: str) -> str:
    if system == "trl":
        return f"TRL {VERSION}"
    return f"ours, critic: {system.replace(LAM1, ', λ = 1').replace(FAST, ', bfloat16, compiled')}"


def _keep(runs: dict[str, list[Run]], base: Outcome, verdicts: dict[str, Verdict]) -> None:
    result = {
        "trl": VERSION,
        "recipe": asdict(Recipe()),
        "seeds": SEEDS,
        "margin": MARGIN,
        "base": asdict(base),
        "runs": {name: [asdict(run) for run in of_system] for name, of_system in runs.items()},
        "verdicts": {name: asdict(verdict) | {"held": verdict.held} for name, verdict in verdicts.items()},
    }
    keep("learning-parity", result)


def plot(runs: dict[str, list[Run]], path: Path) -> None:
    """Reward against episodes and against KL: the mean over seeds, and the seeds themselves faintly."""
    import matplotlib.pyplot as plt
    from matplotlib.figure import Figure

    figure: Figure = plt.figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for colour, (name, of_system) in zip(
        ("tab:orange", "tab:green", "tab:red", "tab:blue", "tab:olive", "tab:cyan"), runs.items(), strict=False
    ):
        rewards_RU = np.array([smoothed([p.reward for p in run.curve]) for run in of_system])
        kls_RU = np.array([smoothed([p.kl for p in run.curve]) for run in of_system])
        episodes_U = [point.episode for point in of_system[0].curve]
        for axes, xs_RU in ((left, np.tile(episodes_U, (len(of_system), 1))), (right, kls_RU)):
            axes.plot(xs_RU.T, rewards_RU.T, color=colour, alpha=0.2, linewidth=0.8)
            axes.plot(xs_RU.mean(0), rewards_RU.mean(0), color=colour, linewidth=2, label=_title(name))
    left.set(xlabel="episodes", ylabel="mean reward (range 0 to 1)")
    right.set(xlabel="KL to the base, nats a response")
    left.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
