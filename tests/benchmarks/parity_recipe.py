"""What both systems of learning-parity are given: one record, handed to each process as JSON."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Recipe:
    """Tuned with TRL alone, so that its final reward lies well inside the reward's range."""

    updates: int = 40
    episodes: int = 64  # an update
    epochs: int = 4
    minibatches: int = 4
    learning_rate: float = 1e-3  # falls linearly to 0 over the updates
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-5
    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    kl: float = 0.02
    gamma: float = 1.0
    lam: float = 0.95
    clip: float = 0.2
    value_clip: float = 0.2
    vf: float = 0.1
    temperature: float = 1.0
    response_length: int = 24


@dataclass(frozen=True)
class Job:
    system: str  # trl, or of ours, which critic: head or adapter, with -lam1 for λ = 1, or -fast
    seed: int
    model: str  # a folder
    recipe: Recipe = Recipe()


@dataclass(frozen=True)
class Point:
    """One update, of the episodes that it was learnt from."""

    episode: int
    reward: float
    kl: float  # k1 summed over a response, nats


def read_job(path: Path) -> tuple[Job, Path]:
    """The job, and the folder to work in."""
    fields = json.loads(path.read_text(encoding="utf-8"))
    folder, recipe = Path(fields.pop("folder")), fields.pop("recipe")
    recipe = {name: tuple(value) if isinstance(value, list) else value for name, value in recipe.items()}
    return Job(**fields, recipe=Recipe(**recipe)), folder


def write_result(folder: Path, job: Job, adapter: Path, curve: list[Point]) -> None:
    result = {"job": asdict(job), "adapter": str(adapter), "curve": [asdict(point) for point in curve]}
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
