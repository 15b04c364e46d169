"""Forecast against measurement: `align run` of PPO on random models of SmolLM2-135M's shape, in processes of their own.

The bars: model state (weights, adapters, heads, gradients, moments) within 1 % of the tensors that PPO holds; the peak,
less what the imports take, within 20 % in each of three configs, which differ in dtype, critic, sizes and lengths.
Prompts and responses are as long as the config lets them be, as the forecast takes them to be.
"""

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import yaml
from rich.console import Console
from rich.table import Table

from align import settings
from align.adapters import AdaptedModel
from align.base import load_base
from align.config import Config
from align.heads import load_head
from align.plan.forecast import forecast
from align.plan.meta import read_shape
from stages.ppo.actor_critic import ActorCritic
from tests.benchmarks.keep import keep
from tests.benchmarks.ppo_update_prepare import prepare
from tests.benchmarks.ppo_update_task import BASE, HEAD, PROMPTS, REWARD, SFT, Shape, Task

STATE_TOLERANCE, PEAK_TOLERANCE = 0.01, 0.20
HELD_OUT = 2  # prompts


@dataclass(frozen=True)
class Setting:
    name: str
    task: Task
    dtype: str = "float32"
    critic: str = "head"
    slots: int = 16


SETTINGS = (
    Setting("float32, critic a head", Task(updates=2, epochs=1)),
    Setting(
        "bfloat16, critic an adapter, micro-batches of 8",
        Task(updates=2, epochs=1, prompt_length=64, response_length=32, micro_batch=8),
        dtype="bfloat16",
        critic="adapter",
    ),
    Setting(
        "float32, rank 32, long responses, refilled slots",
        Task(updates=2, epochs=1, response_length=160, minibatches=4, micro_batch=2, rank=32),
        slots=8,
    ),
)


@dataclass(frozen=True)
class Case:
    """Bytes."""

    name: str
    state_forecast: int
    state_held: int
    peak_forecast: int
    peak_measured: int  # less the imports

    @property
    def errors(self) -> tuple[float, float]:
        """Relative to what was held and measured."""
        return self.state_forecast / self.state_held - 1, self.peak_forecast / self.peak_measured - 1

    @property
    def held(self) -> bool:
        return abs(self.errors[0]) <= STATE_TOLERANCE and abs(self.errors[1]) <= PEAK_TOLERANCE


def run(root: Path) -> int:
    cases = [_case(setting, root / str(number)) for number, setting in enumerate(SETTINGS)]
    table = Table("MB", "state: forecast", "held", "error", "peak less imports: forecast", "measured", "error")
    for case in cases:
        state, peak = (f"{error:+.1%}" for error in case.errors)
        sizes = (case.state_forecast, case.state_held, case.peak_forecast, case.peak_measured)
        cells = [f"{size / 1e6:,.1f}" for size in sizes]
        table.add_row(case.name, *cells[:2], state, *cells[2:], peak)
    Console(width=140).print(table)
    rows = [asdict(case) | {"errors": case.errors, "held": case.held} for case in cases]
    result = {"cases": rows}
    keep("forecast", result)
    return 0 if all(case.held for case in cases) else 1


def _case(setting: Setting, folder: Path) -> Case:
    """What was measured, or what stands in the folder from before, against today's forecast."""
    if not (folder / BASE).exists():
        folder.mkdir(parents=True, exist_ok=True)
        prepare(folder, Shape(), setting.task)
    path = _write_config(setting, folder)
    config = settings.load(path)
    measured = folder / "measured.json"
    if not measured.exists():
        state_held = _state_held(config, folder)
        command = [sys.executable, "-m", "align.cli", "run", str(path), "--json", "--fresh"]
        finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        peak = json.loads(finished.stdout)["memory"]["ppo"]["peak_bytes"]
        measured.write_text(json.dumps({"state_held": state_held, "peak_measured": peak}), encoding="utf-8")
    plan = forecast(config, read_shape(config.base, config.adapters), on_gpu=False)
    learn = next(phase.bytes for phase in plan.phases if phase.name == "learn")
    state = learn.weights + learn.adapters + learn.gradients + learn.optimizer
    found: dict[str, int] = json.loads(measured.read_text(encoding="utf-8"))
    return Case(setting.name, state_forecast=state, peak_forecast=plan.peak("ppo"), **found)


def _write_config(setting: Setting, folder: Path) -> Path:
    task = setting.task
    texts: list[str] = json.loads((folder / PROMPTS).read_text(encoding="utf-8"))
    for name, part in (("train", texts[HELD_OUT:]), ("held_out", texts[:HELD_OUT])):
        lines = [json.dumps({"prompt": text}) + "\n" for text in part]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    lengths = {"max_prompt_length": task.prompt_length, "max_response_length": task.response_length}
    loss = {"epochs": task.epochs, "minibatches": task.minibatches, "micro_batch_size": task.micro_batch}
    config = {
        "run": {"name": "run", "root": str(folder.absolute()), "stages": ["ppo"]},
        "base": {"model": f"./{BASE}", "device": "cpu", "dtype": setting.dtype},
        "adapters": {"rank": task.rank, "alpha": task.alpha},
        "data": {"ppo": {"train": "train.jsonl", "held_out": "held_out.jsonl"}},
        "sft": {"adapter": SFT},
        "reward": {"adapter": REWARD},
        "ppo": {
            "updates": task.updates,
            "rollout": {"episodes": task.episodes, "batch_size": setting.slots, **lengths},
            "critic": {"kind": setting.critic},
            "loss": loss,
        },
        "evaluation": {"prompts": HELD_OUT, "samples": 1},
    }
    path = folder / "forecast.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def _state_held(config: Config, folder: Path) -> int:
    """The bytes of what PPO holds after a step of its optimizer."""
    model = AdaptedModel(load_base(config.base), config.adapters)
    for name in (SFT, REWARD):
        model.load(name, folder / name)
    head, _ = load_head(folder / HEAD, device=model.device)
    actor_critic = ActorCritic(model, config.ppo.critic, config.ppo.optimizer)
    assert actor_critic.critic is not None
    for tensor in actor_critic.names:
        tensor.requires_grad_().grad = torch.ones_like(tensor)
    actor_critic.optimizer.step()
    moments = [t for of in actor_critic.optimizer.state.values() for t in of.values() if torch.is_tensor(t) and t.ndim]
    gradients = [tensor.grad for tensor in actor_critic.names if tensor.grad is not None]
    heads = [*head.parameters(), *actor_critic.critic.head.parameters()]
    held = [*model.base.model.parameters(), *heads, *gradients, *moments]
    return sum(tensor.numel() * tensor.element_size() for tensor in held)
