"""How one step's results reach the next: by value, through `<run>/<step>/result.json`, verified before use."""

import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

from align.artifacts import (
    MANIFEST,
    Artifact,
    read_artifact,
    read_json,
    sha256_of_file,
    sha256_of_json,
    write_json,
    writing,
)
from align.config import Config
from align.context import (
    EvaluationInputs,
    PPOInputs,
    RewardInputs,
    RewardModelArtifacts,
    Sampling,
    SFTInputs,
    member_suffixes,
)
from align.errors import ArtifactError, UsageError
from align.intake import StageData

REJECTS = "rejects.jsonl"
RESULT = "result.json"
_CHANGED = "changed.json"
# Which step makes an input, and as what kind of artifact.
_MADE_BY = {
    "sft": ("sft", "adapter"),
    "reward_adapter": ("reward", "adapter"),
    "reward_head": ("reward", "head"),
    "policy": ("ppo", "adapter"),
}
StageInputs = SFTInputs | RewardInputs | PPOInputs | EvaluationInputs


@dataclass(frozen=True)
class Vitals:
    """What a step cost, and what became of the base."""

    seconds: float
    peak_rss_bytes: int  # of the worker's process in this step, and in loading before its first
    peak_device_memory_bytes: int | None
    base_loads: int
    base_unchanged: bool
    base_dtype: str = "unknown"  # what base.dtype came to; in results of earlier versions not said
    imports_rss_bytes: int = 0  # of the process before it loaded the base
    forecast_bytes: int | None = None  # of the device's memory; on a CPU above the imports

    @property
    def peak_bytes(self) -> int:
        """What the forecast is of."""
        device_bytes = self.peak_device_memory_bytes
        return self.peak_rss_bytes - self.imports_rss_bytes if device_bytes is None else device_bytes


@dataclass(frozen=True)
class FinishedStep:
    fingerprint: Mapping[str, object]
    artifacts: tuple[Artifact, ...]
    metrics: Mapping[str, object]
    accounts: Mapping[str, object]  # of its data by dotted key, and under "stage" of what it set aside itself
    vitals: Vitals

    def verify(self, base_identity: str | None = None) -> None:
        """ArtifactError if an artifact is damaged, is not the one that the step made, or is of another base."""
        for artifact in self.artifacts:
            found = read_artifact(artifact.path, base_identity=base_identity)
            if found.content_hash != artifact.content_hash:
                raise ArtifactError(
                    f"{artifact.path} is not what its stage made (hash {found.content_hash[:12]}…, expected "
                    f"{artifact.content_hash[:12]}…); run it again: --stage {artifact.stage} --fresh"
                )


def read_finished(folder: Path) -> FinishedStep | None:
    """The result that stands in a step's folder, its paths made absolute; None if the step has not finished."""
    path = folder / RESULT
    if not path.exists():
        return None
    content = cast(dict[str, Any], read_json(path))
    try:
        artifacts = [Artifact(**{**record, "path": folder.parent / record["path"]}) for record in content["artifacts"]]
        return FinishedStep(
            fingerprint=content["fingerprint"],
            artifacts=tuple(artifacts),
            metrics=content["metrics"],
            accounts=content["accounts"],
            vitals=Vitals(**content["vitals"]),
        )
    except (KeyError, TypeError) as error:
        raise ArtifactError(f"{path} is not of this version of align ({error}); run its stage with --fresh") from None


def write_finished(folder: Path, step: FinishedStep) -> None:
    run = folder.parent
    artifacts = [{**asdict(a), "path": a.path.relative_to(run).as_posix()} for a in step.artifacts]
    write_json(folder / RESULT, {**asdict(replace(step, artifacts=())), "artifacts": artifacts})


def current_results(run: Path, steps: Sequence[str], *, standing: Collection[str] = ()) -> dict[str, FinishedStep]:
    """The finished steps, less those that were made from artifacts which have since been replaced, unless they are
    `standing` all the same."""
    found: dict[str, FinishedStep] = {}
    for step in steps:
        finished = read_finished(run / step)
        if finished is None:
            continue
        is_current = all(
            content_hash is None or content_hash in [artifact.content_hash for artifact in found[stage].artifacts]
            for key, content_hash in finished.fingerprint.items()
            if (stage := _maker(key)) in found
        )
        if is_current or step in standing:
            found[step] = finished
    return found


def _maker(key: str) -> str | None:
    """Which step makes the input that a fingerprint's key names; None for other keys, and for what users bring."""
    stage, _ = _MADE_BY.get(key.removeprefix("input.").partition("-")[0], (None, None))
    return stage if key.startswith("input.") else None


def begin(folder: Path, fingerprint: Mapping[str, object], *, keep: bool, changed: str = "") -> None:
    """Make a step's folder ready and note what it is started with. Without `keep`, what stood there goes.

    `changed`, what is not as it was when the step began first, is added to what `changed_on_the_way` gives.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RESULT).unlink(missing_ok=True)  # first: it speaks of the rest
        for path in () if keep else sorted(folder.iterdir()):
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != REJECTS:  # written before, when the data was read
                path.unlink()
    if changed:
        write_json(folder / _CHANGED, [*changed_on_the_way(folder), changed])
    write_json(folder / "started.json", fingerprint)


def changed_on_the_way(folder: Path) -> list[str]:
    """What the resumes of a step have found changed, and were allowed to."""
    path = folder / _CHANGED
    return cast("list[str]", read_json(path)) if path.exists() else []


def brought(path: Path, *, kind: str, key: str, base_identity: str | None) -> Artifact:
    """A folder of the user's own. One that we wrote is verified; of any other the contents are hashed.

    Raises:
        ArtifactError: it is not what it should be, is damaged, or was made on another base (if that is given).
    """
    needed = "adapter_config.json" if kind == "adapter" else "*.safetensors"
    if not any(path.glob(needed)):
        raise ArtifactError(f"{key}: {path} holds no {needed}; give a folder in PEFT's format")
    if (path / MANIFEST).exists():
        return replace(read_artifact(path, base_identity=base_identity), kind=kind, stage="brought")
    names = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    digest = sha256_of_json({name: sha256_of_file(path / name) for name in names})
    return Artifact(kind=kind, stage="brought", path=path, step=0, content_hash=digest, base_identity="")


def gather(step: str, config: Config, run: Path, *, base_identity: str, command: str) -> dict[str, Artifact | None]:
    """The artifacts that a step is given, by name, each verified.

    Raises:
        UsageError: a stage that comes before has not run.
        ArtifactError: one is missing, damaged, or made on another base.
    """
    sft_key, reward_key = config.sft.adapter, config.reward.adapter

    def made(name: str) -> dict[str, Artifact | None]:
        stage, kind = _MADE_BY[name]
        finished = read_finished(run / stage)
        if finished is None:
            raise UsageError(f"{step} needs the results of {stage}; first run: {command} --stage {stage}")
        finished.verify(base_identity)
        own = [artifact for artifact in finished.artifacts if artifact.kind == kind]
        return {f"{name}{suffix}": a for suffix, a in zip(member_suffixes(len(own)), own, strict=True)}

    def given(path: Path | None, key: str) -> Artifact | None:
        return path and brought(path, kind="adapter", key=key, base_identity=base_identity)

    if step == "sft":
        return {"adapter": given(sft_key, "sft.adapter")}
    found = made("sft") if "sft" in config.run.stages else {"sft": given(sft_key, "sft.adapter")}
    if step == "reward":
        return {**found, "adapter": given(reward_key, "reward.adapter")}
    if not config.ppo.rewards.uses_reward_model:
        pass
    elif "reward" in config.run.stages:
        found |= made("reward_adapter") | made("reward_head")
    elif reward_key is not None:
        found["reward_adapter"] = given(reward_key, "reward.adapter")
        found["reward_head"] = brought_head(reward_key, base_identity=base_identity)
    return found if step == "ppo" else found | made("policy")


def brought_head(adapter: Path, *, base_identity: str | None) -> Artifact:
    """The scalar head beside a reward adapter that the user brings."""
    head = adapter.parent / "head"
    if not head.is_dir():
        raise ArtifactError(
            f"reward.adapter: {adapter} comes without its scalar head, which is looked for in {head}; put it there, "
            "or put reward into run.stages to train one"
        )
    return brought(head, kind="head", key="reward.adapter", base_identity=base_identity)


def build_inputs(step: str, config: Config, data: StageData, artifacts: Mapping[str, Artifact | None]) -> StageInputs:
    """The record that the step's function takes."""
    train, held_out = cast(Any, data.train), cast(Any, data.held_out)  # of the kind that intake.kind_of says
    if step == "sft":
        return SFTInputs(train, held_out, artifacts["adapter"])
    sampling = Sampling.of(config.ppo.rollout)
    if step == "reward":
        return RewardInputs(artifacts["sft"], train, held_out, sampling, artifacts["adapter"])
    adapters, heads = (
        [a for name, a in artifacts.items() if a is not None and name.partition("-")[0] == kind]
        for kind in ("reward_adapter", "reward_head")
    )
    reward_models = tuple(RewardModelArtifacts(*pair) for pair in zip(adapters, heads, strict=True))
    if config.ppo.rewards.uses_reward_model and not reward_models:
        raise ArtifactError("no reward_adapter: put reward into run.stages, or give reward.adapter")
    if step == "ppo":
        return PPOInputs(artifacts["sft"], reward_models, train, held_out, data.ptx)
    policy = artifacts["policy"]
    assert policy is not None
    return EvaluationInputs(
        sft=artifacts["sft"],
        policy=policy,
        reward_models=reward_models,
        rewards=config.ppo.rewards,
        prompts=held_out,
        sampling=sampling,
    )
