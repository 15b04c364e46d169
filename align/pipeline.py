"""Which steps run, which are skipped, which continue, and why: decided from the run folder, without Ray or torch.

A step's fingerprint is kept as named parts (`sft.learning_rate`, `data.sft.train`, `input.sft`, ...), so that the
reason to run again can be said.
"""

import difflib
import json
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import BaseModel

from align.artifacts import Artifact, checkpoint_folders, newest_whole, read_json
from align.config import Config, PPOCheckpointsConfig, StageName
from align.errors import ArtifactError, UsageError
from align.results import FinishedStep, maker_of, read_finished

StepName = Literal["sft", "reward", "ppo", "evaluation"]
STEPS: tuple[StepName, ...] = ("sft", "reward", "ppo", "evaluation")
Fingerprint = Mapping[str, object]

# What changes what a step keeps on its way, not what comes out.
_WITHOUT_EFFECT = frozenset(
    f"{step}.checkpoints.{key}" for step in ("sft", "reward", "ppo") for key in PPOCheckpointsConfig.model_fields
)
# A checkpoint's tensors are of the one that they were made with: it cannot be gone on with under another.
_ADAPTERS = ("adapters.rank", "adapters.targets", "adapters.layers")
_BOUND = frozenset(
    ("base.identity", "run.seed", *_ADAPTERS, "ppo.critic.kind", "ppo.advantage.estimator", "reward.ensemble")
)
# These name files; their contents stand in the fingerprint instead, as input.* hashes.
_BY_CONTENT = frozenset({"sft.adapter", "reward.adapter"})


@dataclass(frozen=True)
class RunCall:
    """One `align run`, as it was called."""

    command: str  # "align run CONFIG OVERRIDES"
    stage: str | None = None  # only this one
    resume: bool = False
    fresh: bool = False
    allowed: tuple[str, ...] = ()  # what a resume may find changed, by its name in the refusal

    @property
    def plain(self) -> str:
        """Without what it was told of a run that stopped."""
        return self.command if self.stage is None else f"{self.command} --stage {self.stage}"

    @property
    def again(self) -> str:
        """The command that goes on where this one stops."""
        changes = [f"--allow-change {shlex.quote(name)}" for name in self.allowed]
        return " ".join([self.plain, "--resume", *changes])

    def anew(self, stage: str) -> str:
        return f"{self.command} --stage {stage} --fresh"


@dataclass(frozen=True)
class Decision:
    kind: Literal["run", "skip", "resume"]
    reason: str
    finished: FinishedStep | None = None  # of a skipped step
    split: int = 1  # parts that a resumed step computes its micro-batches in
    changed: str = ""  # since the resumed step began, and allowed to: for people


def steps_to_do(config: Config, stage: str | None) -> tuple[StepName, ...]:
    """The steps of one command. Evaluation belongs to ppo: it always follows it."""
    if stage is not None and stage not in config.run.stages:
        known = ", ".join(config.run.stages)
        raise UsageError(f"--stage {stage}: run.stages of this config has only {known}; add {stage} there")
    stages: Sequence[StageName] = [name for name in config.run.stages if stage in (None, name)]
    return (*stages, *(("evaluation",) if "ppo" in stages else ()))


def stage_of(step: StepName) -> StageName:
    return "ppo" if step == "evaluation" else step


def fingerprint(
    step: StepName, config: Config, *, base_identity: str, data: Mapping[str, object], inputs: Mapping[str, str | None]
) -> Fingerprint:
    """Everything that the step's outcome depends on, by name.

    Args:
        data: content hashes and split of the step's data, by dotted key.
        inputs: content hash of each artifact that the step is given; None where it gets none.
    """
    section: BaseModel = getattr(config, step)
    parts: dict[str, object] = {
        **_flat(section, step),
        **_flat(config.adapters, "adapters"),
        **data,
        **{f"input.{name}": value for name, value in inputs.items()},
        "base.identity": base_identity,
        "base.dtype": config.base.dtype,
        "base.device": config.base.device,
        "base.compile": config.base.compile,
        "base.trust_remote_code": config.base.trust_remote_code,
        "data.system_prompt": config.data.system_prompt,
        "run.seed": config.run.seed,
    }
    if step in ("reward", "evaluation"):  # both sample as PPO does; how many side by side is not worth a training
        parts |= _flat(config.ppo.rollout, "ppo.rollout")
        del parts["ppo.rollout.batch_size"]
    if step == "evaluation":
        parts |= _flat(config.ppo.rewards, "ppo.rewards")
    kept = {key: value for key, value in parts.items() if key not in _WITHOUT_EFFECT | _BY_CONTENT}
    return json.loads(json.dumps(kept))  # as it will be read back: tuples are lists


def stale(step: StepName, finished: FinishedStep, config: Config, *, base_identity: str) -> str:
    """What of the settings has changed since a step finished, for people; its data is not looked at."""
    settings = fingerprint(step, config, base_identity=base_identity, data={}, inputs={})
    return changes({key: finished.fingerprint.get(key) for key in settings}, settings, at_most=4)


def _flat(section: BaseModel, prefix: str) -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in section:
        if isinstance(value, BaseModel):
            flat |= _flat(value, f"{prefix}.{name}")
        elif isinstance(value, tuple) and any(isinstance(item, BaseModel) for item in value):
            for number, item in enumerate(cast("tuple[BaseModel, ...]", value)):
                flat |= _flat(item, f"{prefix}.{name}.{number}")
        else:
            flat[f"{prefix}.{name}"] = str(value) if isinstance(value, Path) else value
    return flat


def verify_allowed(names: Sequence[str], config: Config, steps: Sequence[StepName]) -> None:
    """UsageError for an --allow-change that names nothing, or what a checkpoint cannot do without."""
    for name in names:
        if name in _BOUND:
            raise UsageError(
                f"--allow-change {name}: a checkpoint cannot be continued under another one; start anew with --fresh"
            )
        settings = {key for step in steps for key in fingerprint(step, config, base_identity="", data={}, inputs={})}
        is_known = name in settings or f".{name}" in _flat(config, "")  # with or without effect
        if not is_known and not name.startswith(("data.", "input.")):
            near = difflib.get_close_matches(name, settings, n=1)
            meant = f"did you mean {near[0]}?" if near else "write it as the refusal of --resume does"
            raise UsageError(f"--allow-change {name}: nothing of this name is looked at in a resume; {meant}")


def changes(
    old: Fingerprint,
    new: Fingerprint,
    *,
    only: Collection[str] = (),
    but: Collection[str] = (),
    at_most: int | None = None,
) -> str:
    """What differs, for people: "config sft.learning_rate changed (0.0002 → 0.001)"; empty if nothing does.

    Args:
        only: the keys to look at; all if there is none.
        but: keys not to look at.
        at_most: so many are named, the rest is counted.
    """
    keys = [key for key in (*new, *(key for key in old if key not in new)) if old.get(key) != new.get(key)]
    keys = [key for key in keys if key not in but and (not only or key in only)]
    said = [_change(key, old.get(key), new.get(key)) for key in keys[:at_most]]
    return "; ".join([*said, *([f"and {len(keys) - len(said)} more"] if len(keys) > len(said) else [])])


def _change(key: str, old: object, new: object) -> str:
    if key.startswith("input."):
        return f"its input changed ({key})"
    if key == "base.identity":
        return f"base model changed ({str(old)[:12]}… → {str(new)[:12]}…)"
    if key.startswith("data.") and key.endswith(("train", "held_out")):
        return f"the rows of {key} changed"
    if key == "data.system_prompt":
        return "config data.system_prompt changed"
    return f"config {key} changed ({old} → {new})"


def decide(step: StepName, folder: Path, parts: Fingerprint, call: RunCall) -> Decision:
    """What to do about one step, whose folder is `folder`. An unfinished one goes on: `refuse_unfinished` has asked.

    Of what a resume may find changed, a finished step stands as it is, and an unfinished one goes on with what it is
    now.

    Raises:
        UsageError: the inputs of an unfinished step, or with --resume of a finished one, are not what they were.
        ArtifactError: the step is finished and its artifacts are damaged.
    """
    if call.fresh:
        return Decision("run", "asked for with --fresh")
    finished = read_finished(folder)
    if finished is not None:
        changed = changes(finished.fingerprint, parts, but=call.allowed)
        if not changed:
            finished.verify(anew=call.anew(stage_of(step)))
            let = changes(finished.fingerprint, parts)
            return Decision("skip", f"stands though {let}" if let else "inputs unchanged", finished=finished)
        if call.resume and not _is_remade(folder.parent, finished.fingerprint, parts, call):
            raise UsageError(_refusal(step, changed, call))
        return Decision("run", f"run again: {changes(finished.fingerprint, parts, but=call.allowed, at_most=4)}")
    checkpoint = newest_checkpoint(folder)
    if checkpoint is None:
        return Decision("run", "started before and did not finish" if _started(folder) else "not run yet")
    started = _started(folder)
    if started is None:
        raise ArtifactError(
            f"{folder / 'started.json'} is missing: nothing says what {checkpoint.path.name} was made with; start this "
            f"stage anew: {call.anew(folder.name)}"
        )
    changed = changes(started, parts, but=call.allowed)
    if changed:
        raise UsageError(_refusal(step, changed, call))
    let = changes(started, parts, only=call.allowed) if call.allowed else ""
    state = cast("dict[str, Any]", read_json(checkpoint.path / "state.json"))
    after = f"after update {checkpoint.step}{f', though {let}' if let else ''}"
    sizes = [key for key in parts if key.endswith(".micro_batch_size")]
    is_same_size = all(started.get(key) == parts[key] for key in sizes)  # or the split was of another micro-batch
    split = state["split"] if is_same_size else 1
    return Decision("resume", f"continues {after}", split=split, changed=after if let else "")


def _is_remade(run: Path, old: Fingerprint, new: Fingerprint, call: RunCall) -> bool:
    """Whether an input is another because the step that makes it has been run again: then nobody has to be asked."""
    remade = [key for key in new if old.get(key) != new[key] and key not in call.allowed and maker_of(key) is not None]
    return any(read_finished(run / str(maker_of(key))) is not None for key in remade)


def _refusal(step: StepName, changed: str, call: RunCall) -> str:
    # Nothing is lost with an evaluation, and `anew` would be of the whole stage that it belongs to
    again = f"run it again: {call.plain}" if step == "evaluation" else f"start this stage anew: {call.anew(step)}"
    return (
        f"--resume refused, {step}: {changed}. Put that back to continue, or allow it by its name (--allow-change "
        f"KEY), or {again}"
    )


def refuse_unfinished(folder: Path, call: RunCall) -> None:
    """UsageError if the stage in `folder` stopped half-way: for a call that does not say what to do with checkpoints.

    The driver asks this of all its steps before the first one runs, so that nobody waits for SFT to hear it.
    """
    unfinished = checkpoint_folders(folder / "checkpoints")
    if (folder / "result.json").exists() or not unfinished:
        return
    raise UsageError(
        f"{folder} holds an unfinished {folder.name} ({unfinished[-1].name}). Continue it: {call.again}; "
        f"or discard its checkpoints and start it anew: {call.anew(folder.name)}"
    )


def newest_checkpoint(folder: Path) -> Artifact | None:
    """The newest whole checkpoint of a step: the one that the stage will continue from. ArtifactError if none is."""
    found, damage = newest_whole(folder / "checkpoints")
    if damage and found is None:
        raise ArtifactError(f"no checkpoint can be continued from ({damage[0]}); start the stage anew with --fresh")
    return found


def _started(folder: Path) -> Fingerprint | None:
    path = folder / "started.json"
    if not path.exists():
        return None
    parts = read_json(path)
    if not isinstance(parts, dict):
        raise ArtifactError(f"{path} is damaged: not an object; start the stage anew with --fresh")
    return parts
