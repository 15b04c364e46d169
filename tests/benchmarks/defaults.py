"""Are PPO's defaults the settings that do best? Each of them changed alone, on learning-parity's task.

The base of comparison is our configuration with every default, but for the sizes and the learning rate of
learning-parity's recipe. Each variant and seed is trained as there, and judged by fresh answers to held-out prompts:
reward − 0.05 · KL, which is what PPO maximises with the default coefficient. Differences are paired by seed; a variant
is better if its 95 % interval lies above 0. The exit code is 1 if one is.
"""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from align.config import PPOConfig
from tests.benchmarks.intervals import Interval, mean_interval
from tests.benchmarks.keep import keep
from tests.benchmarks.parity_evaluation import Outcome, evaluate
from tests.benchmarks.parity_ours import SCRIPTED, train
from tests.benchmarks.parity_recipe import Job, Recipe
from tests.benchmarks.parity_task import find_model
from tests.benchmarks.peer.installation import finish, start

SEEDS = tuple(range(6))
PROCESSES = 2  # of one thread each
DEFAULTS = "the defaults"
Change = dict[str, dict[str, object]]
_FOUR: dict[str, object] = {"responses_per_prompt": 4}
VARIANTS: dict[str, Change] = {
    DEFAULTS: {},
    "advantage.lam=0.95": {"advantage": {"lam": 0.95}},
    "advantage.whiten=false": {"advantage": {"whiten": False}},
    "advantage.estimator=rloo, 4 responses": {"advantage": {"estimator": "rloo"}, "rollout": _FOUR},
    "advantage.estimator=grpo, 4 responses": {"advantage": {"estimator": "grpo"}, "rollout": _FOUR},
    "critic.kind=adapter": {"critic": {"kind": "adapter"}},
    "critic.learning_rate=the policy's": {"critic": {"learning_rate": Recipe.learning_rate}},
    "critic.clip=null": {"critic": {"clip": None}},
    "critic.coefficient=0.5": {"critic": {"coefficient": 0.5}},
    "kl.place=loss": {"kl": {"place": "loss"}},
    "loss.average=sequence": {"loss": {"average": "sequence"}},
    "loss.clip_high=0.28": {"loss": {"clip_high": 0.28}},
    "loss.epochs=2": {"loss": {"epochs": 2}},
    "loss.entropy_bonus=0.01": {"loss": {"entropy_bonus": 0.01}},
    "rewards.whiten=true": {"rewards": {"whiten": True}},
    "rewards.normalize=running": {"rewards": {"normalize": "running"}},
}


@dataclass(frozen=True)
class Compared:
    reward: Interval
    kl: Interval
    objective: Interval
    gain: Interval | None  # of the objective over that of the defaults, paired by seed


def run(root: Path) -> int:
    model = str(find_model())
    jobs = {(name, seed): Job(name, seed, model) for seed in SEEDS for name in VARIANTS}
    with ThreadPoolExecutor(PROCESSES) as pool:
        folders = dict(zip(jobs, pool.map(lambda job: _trained(job, root), jobs.values()), strict=True))
    outcomes = {name: [_outcome(folders[name, seed]) for seed in SEEDS] for name in VARIANTS}
    compared = compare(outcomes)
    _print(compared)
    result = {"seeds": SEEDS, "variants": {name: asdict(own) for name, own in compared.items()}}
    keep("defaults", result)
    return 1 if any(own.gain is not None and own.gain.low > 0 for own in compared.values()) else 0


def compare(outcomes: dict[str, list[Outcome]]) -> dict[str, Compared]:
    def objectives(name: str) -> list[float]:
        coefficient = PPOConfig().kl.coefficient
        return [outcome.reward - coefficient * outcome.kl for outcome in outcomes[name]]

    base = objectives(DEFAULTS)
    return {
        name: Compared(
            mean_interval([outcome.reward for outcome in own]),
            mean_interval([outcome.kl for outcome in own]),
            mean_interval(objectives(name)),
            None if name == DEFAULTS else mean_interval([a - b for a, b in zip(objectives(name), base, strict=True)]),
        )
        for name, own in outcomes.items()
    }


def _trained(job: Job, root: Path) -> Path:
    """The folder of the finished run, which is made unless it is there."""
    folder = root.absolute() / "defaults" / f"{list(VARIANTS).index(job.system)}-{job.seed}"
    if not (folder / "outcome.json").is_file():
        finish(start("tests.benchmarks.defaults", asdict(job), folder), folder)
    return folder


def _outcome(folder: Path) -> Outcome:
    return Outcome(**json.loads((folder / "outcome.json").read_text(encoding="utf-8")))


def config_of(name: str) -> PPOConfig:
    recipe = Recipe()
    sizes: Change = {
        "rollout": {
            "episodes": recipe.episodes,
            "max_response_length": recipe.response_length,
            "batch_size": recipe.episodes,
        },
        "rewards": {"sources": [SCRIPTED], "normalize": "none"},
        "optimizer": {"learning_rate": recipe.learning_rate},
    }
    change = VARIANTS[name]
    sections = {key: {**sizes.get(key, {}), **change.get(key, {})} for key in (*sizes, *change)}
    return PPOConfig.model_validate(
        {"updates": recipe.updates, "checkpoints": {"every": None, "every_minutes": None}, **sections}
    )


def _train(job: Job, folder: Path) -> None:
    result = train(config_of(job.system), job, folder)
    outcome = evaluate(job, result.artifact("adapter").path)
    (folder / "outcome.json").write_text(json.dumps(asdict(outcome)), encoding="utf-8")


def _print(compared: dict[str, Compared]) -> None:
    table = Table("", "reward", "KL, nats", "reward − 0.05 · KL", "less that of the defaults", "better")
    for name, own in compared.items():
        gain = ("", "") if own.gain is None else (str(own.gain), "YES" if own.gain.low > 0 else "no")
        table.add_row(name, str(own.reward), str(own.kl), str(own.objective), *gain)
    Console().print(table)


if __name__ == "__main__":
    from tests.benchmarks.parity_recipe import read_job

    _train(*read_job(Path(sys.argv[1])))
