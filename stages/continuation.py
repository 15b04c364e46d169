"""Checkpoints of what TRL's trainers train, and going on from one to the bit.

A trainer's own checkpoints are pickles, and of a shared base it would save the whole. So a callback writes ours, and
on a resume puts optimizer, schedule and random states back itself; the trainer is only told the step and the weights,
by a temporary folder of two files that are not pickles. It then skips the rows it has had.
"""

import random
from collections.abc import Callable, Mapping, Sized
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from align.artifacts import write_json, writing
from align.checkpoints import Checkpoint, Groups, StageCheckpoints, State, optimizer_tensors, restore_optimizer
from align.errors import InvariantError, UsageError
from stages.trainer import ReportToTracker


@dataclass(frozen=True)
class EndOfStep:
    """What of a trainer's step has to be taken as it ends. The rest stays as it is until the next one's."""

    trainer: State
    random: Groups


class TrainerCheckpoints(TrainerCallback):
    """Owns what of a trainer's state has to survive. Its callback stands after those whose state it saves.

    Args:
        start: what to continue from; one without a trainer's state is of before its first step.
        also: what the stage wants kept beside, as (groups, state) of a checkpoint.
        quality: what a look in the present step said of held-out data, if there was one: higher is better.
        steps_before: of trainings before this one in the same stage.
    """

    def __init__(
        self,
        checkpoints: StageCheckpoints,
        report: ReportToTracker,
        *,
        start: Checkpoint | None,
        also: Callable[[], tuple[Groups, State]],
        quality: Callable[[], float | None] = lambda: None,
        steps_before: int = 0,
    ) -> None:
        self._checkpoints = checkpoints
        self._report = report
        self._start = start if start is not None and "trainer" in start.state else None
        self._also = also
        self._quality = quality
        self._steps_before = steps_before
        self._epoch_random: dict[str, Tensor] = {}  # random states as its epoch began, which its order comes from
        self._step = steps_before if self._start is None else self._start.step  # of the stage, the last finished one
        self._last: EndOfStep | None = None  # of this process
        self._names: dict[Tensor, str] = {}
        self._optimizer: Any = None
        self._schedule: Any = None

    def train(self, trainer: Trainer, *, num_rows: int) -> int:
        """Let it train, from where it was; returns the steps in all. InvariantError unless it has all rows."""
        kept = len(cast(Sized, trainer.train_dataset))
        if kept != num_rows:
            raise InvariantError(f"TRL's trainer kept {kept} of {num_rows} rows")
        trainer.remove_callback(PrinterCallback)
        if self._start is None:
            return trainer.train().global_step
        folder = Path(str(trainer.args.output_dir))
        write_json(folder / "trainer_state.json", self._start.state["trainer"], durable=False)
        with writing(folder):
            save_file(dict(self._start.groups["trained"]), folder / "model.safetensors")
        return trainer.train(resume_from_checkpoint=str(folder)).global_step

    # ---- what the trainer calls ----

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model: nn.Module = kwargs["model"]
        self._names = {tensor: name for name, tensor in model.named_parameters() if tensor.requires_grad}
        self._optimizer, self._schedule = kwargs["optimizer"], kwargs["lr_scheduler"]
        if self._start is not None:
            restore_optimizer(self._optimizer, self._names, self._start.groups["optimizer"])
            _restore_schedule(self._schedule, self._start.state["schedule"])

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._start is not None:
            put_random_states_back(self._start.groups["epoch_random"])
            if _is_between_epochs(state):
                self._start = None  # all is back
        self._epoch_random = random_states()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._start is not None:  # the rows before have been drawn and skipped
            put_random_states_back(self._start.groups["random"])
            self._start = None
        self._stop_if_asked()

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._stop_if_asked()

    def _stop_if_asked(self) -> None:
        """Between two optimizer steps: weights and optimizer are what the last one has made of them."""
        self._checkpoints.stop_if_asked(self._step, self._content)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """The last thing of a step. One that ends the training needs no checkpoint."""
        if "loss" not in (logs or {}):
            return
        own, self._step = random_states(), self._steps_before + state.global_step
        epoch_random = own if _is_between_epochs(state) else self._epoch_random
        self._last = EndOfStep(
            trainer=asdict(replace(state, log_history=[])),
            random={"random": own, "epoch_random": epoch_random},
        )
        is_last = control.should_training_stop or state.global_step == state.max_steps
        quality = self._quality()
        if not is_last and self._checkpoints.is_due(self._step, quality):
            self._checkpoints.save(self._step, *self._content(), quality)

    def _content(self) -> tuple[Groups, State]:
        assert self._last is not None
        groups, also = self._also()
        return (
            {
                **groups,
                **self._last.random,
                "trained": {name: tensor.detach() for tensor, name in self._names.items()},
                "optimizer": optimizer_tensors(self._optimizer, self._names),
            },
            {
                **also,
                "trainer": self._last.trainer,
                "schedule": self._schedule.state_dict(),
                "num_tokens": self._report.num_tokens,
            },
        )


def verify_epochs(key: str, ended: State, now: float) -> None:
    """`ended` is the state of a training that has. UsageError if it was of other epochs: these have no effect now."""
    then = ended["epochs"]
    if then != now:
        raise UsageError(
            f"{key}: a training of {then:g} epochs has ended; for {now:g} start the stage anew with --fresh, or put "
            f"{key}={then:g} back (--resume --allow-change {key})"
        )


def tokens_before(start: Checkpoint | None) -> float:
    """What ReportToTracker has to begin with."""
    return 0.0 if start is None else start.state.get("num_tokens", 0.0)


def _restore_schedule(schedule: LambdaLR, state: Mapping[str, Any]) -> None:
    """How far it was, and no more: the rates are those of the present config, which may have been changed."""
    schedule.load_state_dict({**state, "base_lrs": schedule.base_lrs})
    rates = [
        base * share(schedule.last_epoch) for base, share in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    ]
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates  # pyright: ignore[reportPrivateUsage] # what get_last_lr gives until the next step


def random_states() -> dict[str, Tensor]:
    """Of Python, numpy, torch and each GPU, as tensors."""
    version, numbers, _ = random.getstate()
    _, keys, position, *_ = np.random.get_state(legacy=True)
    states = {
        "python": torch.tensor([version, *numbers], dtype=torch.int64),
        "numpy": torch.tensor([*map(int, keys), int(position)], dtype=torch.int64),
        "torch": torch.get_rng_state(),
    }
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return states | {f"gpu{number}": state for number, state in enumerate(gpus)}


def put_random_states_back(states: Mapping[str, Tensor]) -> None:
    version, *numbers = states["python"].tolist()
    random.setstate((version, tuple(numbers), None))
    *keys, position = states["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, 0, 0.0))
    torch.set_rng_state(states["torch"])
    for number in range(torch.cuda.device_count()):
        if f"gpu{number}" in states:
            torch.cuda.set_rng_state(states[f"gpu{number}"], number)


def _is_between_epochs(state: TrainerState) -> bool:
    return float(state.epoch or 0.0).is_integer()
