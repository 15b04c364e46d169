"""Checkpoints: directories that hold what a bit-exact continuation needs, whole or not there.

Tensors stand in safetensors files, the rest in sorted JSON, so that equal states are equal bytes.
"""

import logging
import math
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from align.artifacts import (
    Artifact,
    checkpoint_folders,
    newest_whole,
    read_json,
    verify_base,
    write_directory,
    write_json,
    writing,
)
from align.config import BestCheckpointsConfig, CheckpointsConfig
from align.context import StageContext
from align.errors import ArtifactError
from align.kernels import cpu, native

_log = logging.getLogger(__name__)


Groups = Mapping[str, Mapping[str, Tensor]]  # a file's name to its tensors
State = Mapping[str, Any]  # JSON


@dataclass(frozen=True)
class Checkpoint:
    """What must survive: tensors, and in `state` the rest (controller, schedule, ...)."""

    step: int
    groups: Groups
    state: State


def environment() -> dict[str, object]:
    """What the bits depend on besides the state: a resume under another one is not bit-exact, and says so."""
    return {
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "kernels": native.present(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu.description(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "trl")},
    }


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """The optimizer's state by parameter name; Adam's step counts included, as tensors."""
    found: dict[str, Tensor] = {}
    for parameter, values in optimizer.state.items():
        for key, value in values.items():
            found[f"{names[parameter]}/{key}"] = torch.as_tensor(value)
    return found


def restore_optimizer(
    optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str], tensors: Mapping[str, Tensor]
) -> None:
    """Put back what optimizer_tensors took, in place of whatever state there is."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = {names[parameter]: number for number, parameter in enumerate(parameters)}
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, field = key.rsplit("/", 1)
        state.setdefault(numbers[name], {})[field] = tensor.clone()
    # which knows what belongs on the parameter's device, and what on the CPU
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def save_checkpoint(
    folder: Path, checkpoint: Checkpoint, *, stage: str, base_identity: str, keep: int, keep_best: int = 0
) -> Artifact:
    """Write `folder/update-00010` in one step, then delete all up to it but the newest `keep` and the `keep_best` whose
    state has the highest "quality".

    Later ones can only be damaged and passed over by the resume that led here: they go too.
    """

    def fill(path: Path) -> None:
        for name, tensors in checkpoint.groups.items():
            own = {key: tensor.detach().cpu().contiguous() for key, tensor in sorted(tensors.items())}
            save_file(own, path / f"{name}.safetensors")
        write_json(path / "state.json", {**checkpoint.state, "environment": environment()})

    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"update-{checkpoint.step:05d}"
    artifact = write_directory(
        path, fill, kind="checkpoint", stage=stage, step=checkpoint.step, base_identity=base_identity
    )
    there = checkpoint_folders(folder)
    earlier = there[: there.index(path) + 1]
    kept = {*earlier[-keep:], *(_best(earlier)[-keep_best:] if keep_best else ())}
    for other in there:
        if other not in kept:
            with writing(other):
                shutil.rmtree(other)
    return artifact


def _best(checkpoints: Iterable[Path]) -> list[Path]:
    """Those that were looked at, the best last."""
    qualities = {path: _quality(path) for path in checkpoints}
    return sorted((path for path, quality in qualities.items() if quality > -math.inf), key=qualities.__getitem__)


def _quality(checkpoint: Path) -> float:
    """-inf for one that was not looked at, and for one that cannot be read."""
    try:
        state = read_json(checkpoint / "state.json")
    except ArtifactError:
        return -math.inf
    quality = state.get("quality") if isinstance(state, dict) else None
    return quality if isinstance(quality, float) else -math.inf


def load_newest(folder: Path, *, base_identity: str) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint, and notes: on damaged ones passed over, on an environment that differs.

    Raises:
        ArtifactError: it was made on another base.
    """
    artifact, damage = newest_whole(folder)
    notes = [f"passed over: {what}" for what in damage]
    if artifact is None:
        return None, notes
    verify_base(artifact, base_identity)
    path = artifact.path
    groups = {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}
    state = read_json(path / "state.json")
    assert isinstance(state, dict)
    then, now = state["environment"], environment()
    if then != now:
        differing = [f"{key}: {then.get(key)} → {value}" for key, value in now.items() if then.get(key) != value]
        notes.append(f"resumed under another environment, so not bit-exact: {'; '.join(differing)}")
    return Checkpoint(artifact.step, groups, state), notes


class StageCheckpoints:
    """Owns a stage's checkpoints: when the next is due, which are kept, and what of the logs belongs to each."""

    def __init__(self, config: CheckpointsConfig, context: StageContext) -> None:
        self._config = config
        self._context = context
        self._folder = context.folder / "checkpoints"
        self._saved = time.monotonic()  # or begun: either way what is later would be lost
        self._saved_step = 0
        self.seconds = 0.0  # that the last one took

    def is_due(self, step: int, quality: float | None = None) -> bool:
        """`quality` is what a look at held-out data has just said, where there was one: higher is better."""
        if quality is not None and self._keep_best:
            return True
        every, minutes = self._config.every, self._config.every_minutes
        is_time = minutes is not None and time.monotonic() - self._saved >= 60 * minutes
        return is_time or (every is not None and step % every == 0)

    @property
    def _keep_best(self) -> int:
        return self._config.keep_best if isinstance(self._config, BestCheckpointsConfig) else 0

    def save(self, step: int, groups: Groups, state: State, quality: float | None = None) -> None:
        """What has been logged so far comes before the step, what is logged later after it."""
        start = time.monotonic()
        own = {"lines": self._context.tracker.settle(), "split": self._context.split, "quality": quality}
        checkpoint = Checkpoint(step, groups, {**state, **own})
        save_checkpoint(
            self._folder,
            checkpoint,
            stage=self._context.folder.name,
            base_identity=self._context.model.base_identity,
            keep=self._config.keep_last,
            keep_best=self._keep_best,
        )
        self._saved, self._saved_step = time.monotonic(), step
        self.seconds = self._saved - start

    def stop_if_asked(self, step: int, content: Callable[[], tuple[Groups, State]]) -> None:
        """`step` is the last that is finished, and `content` what has to survive of it.

        Raises:
            StoppedError: the driver has asked for it; the step is on the disk.
        """

        def save() -> None:
            if step != self._saved_step:
                self.save(step, *content())

        self._context.stop_if_asked(save)

    def resume(self) -> Checkpoint | None:
        """What the stage continues from, the logs put back to where they were then; None if it starts anew."""
        if not self._context.resume:
            return None
        checkpoint, notes = load_newest(self._folder, base_identity=self._context.model.base_identity)
        for note in notes:
            _log.warning(note)
        self._context.tracker.rewind({} if checkpoint is None else checkpoint.state["lines"])
        self._saved_step = 0 if checkpoint is None else checkpoint.step
        return checkpoint
