"""What both systems of ppo-update are given, as JSON, and what each reports from its own process."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tests.benchmarks.machine import best_matrix_rate
from tests.benchmarks.process_tree import resident_bytes

BASE, SFT, REWARD, HEAD, PROMPTS = "base", "sft", "reward", "head", "prompts.json"  # in the prepared folder
END = "<never>"  # the EOS token, with an id that the model does not have


@dataclass(frozen=True)
class Shape:
    """SmolLM2-135M's. The embeddings are tied, so that it has 134.5 million parameters."""

    vocabulary: int = 49_152
    width: int = 576
    intermediate: int = 1536
    layers: int = 30
    heads: int = 9
    kv_heads: int = 3


@dataclass(frozen=True)
class Task:
    updates: int = 3  # the first warms up and does not count
    episodes: int = 16  # an update
    prompt_length: int = 48
    response_length: int = 64  # of every response: nothing can end one
    epochs: int = 4
    minibatches: int = 2
    micro_batch: int = 4
    rank: int = 16
    alpha: float = 32.0
    learning_rate: float = 1e-4
    temperature: float = 1.0
    lam: float = 0.95
    adapted_layers: Literal["all"] | int = "all"  # or the last n; ours alone, as is the next one
    reward_models: int = 1


@dataclass(frozen=True)
class Job:
    system: str  # trl (as shipped), trl-lora (with a LoRA critic), or which critic of ours: head or adapter (-compiled)
    dtype: str
    prepared: str  # the folder that ppo_update_prepare has made
    task: Task = Task()


@dataclass(frozen=True)
class Update:
    """Seconds of one update. `whole` runs from the end of the update before to its own end, so nothing is left out."""

    generate: float
    score: float
    learn: float
    whole: float


@dataclass(frozen=True)
class Report:
    updates: list[Update]  # those that count
    optimizer_steps: int  # an update
    imports_bytes: int  # resident once everything was imported, and nothing loaded
    peak_bytes: int  # most ever resident
    threads: int
    matrix_rate: float  # FLOP/s of a square product in the same dtype, with the same threads


def read_job(path: Path) -> tuple[Job, Path]:
    """The job, and the folder to work in."""
    fields = json.loads(path.read_text(encoding="utf-8"))
    folder, task = Path(fields.pop("folder")), fields.pop("task")
    return Job(**fields, task=Task(**task)), folder


def write_report(
    folder: Path, job: Job, updates: list[Update], *, optimizer_steps: int, imports_bytes: int, threads: int
) -> None:
    """Call it when all is done: the peak is read here, before the matrices of the rate are made."""
    _, peak_bytes = resident_bytes(os.getpid())
    report = Report(updates, optimizer_steps, imports_bytes, peak_bytes, threads, best_matrix_rate(job.dtype))
    (folder / "report.json").write_text(json.dumps(asdict(report)), encoding="utf-8")


def read_report(folder: Path) -> Report:
    fields: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    updates = [Update(**update) for update in fields.pop("updates")]
    return Report(updates, **fields)
