"""How one step's results reach the next: by value, each artifact verified before use."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from align.artifacts import MANIFEST, Artifact, read_artifact, sha256_of_file, sha256_of_json, verify_base
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
from align.results import read_finished

StageInputs = SFTInputs | RewardInputs | PPOInputs | EvaluationInputs


@dataclass(frozen=True)
class Handover:
    """Where the artifacts of a run's steps come from: earlier steps, or the user.

    Every method raises UsageError if a step that comes before has not run, and ArtifactError if an artifact is missing,
    damaged, or made on another base.
    """

    config: Config
    run: Path
    base_identity: str
    command: str  # what was called, for remedies

    def inputs(self, step: str, data: StageData) -> StageInputs:
        """The record that the step's function takes."""
        train, held_out = cast(Any, data.train), cast(Any, data.held_out)  # of the kind that intake.kind_of says
        if step == "sft":
            return SFTInputs(train, held_out, self._given("sft.adapter", self.config.sft.adapter))
        sft, sampling = self._sft(step), Sampling.of(self.config.ppo.rollout)
        if step == "reward":
            return RewardInputs(
                sft, train, held_out, sampling, self._given("reward.adapter", self.config.reward.adapter)
            )
        reward_models = self._reward_models(step) if self.config.ppo.rewards.uses_reward_model else ()
        if step == "ppo":
            return PPOInputs(sft, reward_models, train, held_out, data.ptx)
        return EvaluationInputs(
            sft=sft,
            policy=self._adapter(step, "ppo"),
            reward_models=reward_models,
            rewards=self.config.ppo.rewards,
            prompts=held_out,
            sampling=sampling,
        )

    def _sft(self, step: str) -> Artifact | None:
        if "sft" in self.config.run.stages:
            return self._adapter(step, "sft")
        return self._given("sft.adapter", self.config.sft.adapter)

    def _reward_models(self, step: str) -> tuple[RewardModelArtifacts, ...]:
        if "reward" in self.config.run.stages:
            made = self._made(step, "reward")
            adapters, heads = ([a for a in made if a.kind == kind] for kind in ("adapter", "head"))
            return tuple(RewardModelArtifacts(*pair) for pair in zip(adapters, heads, strict=True))
        path = self.config.reward.adapter
        adapter = self._given("reward.adapter", path)
        assert path is not None  # Config has seen to it
        assert adapter is not None
        return (RewardModelArtifacts(adapter, brought_head(path, base_identity=self.base_identity)),)

    def _adapter(self, step: str, stage: str) -> Artifact:
        return next(artifact for artifact in self._made(step, stage) if artifact.kind == "adapter")

    def _made(self, step: str, stage: str) -> tuple[Artifact, ...]:
        finished = read_finished(self.run / stage)
        if finished is None:
            raise UsageError(f"{step} needs the results of {stage}; first run: {self.command} --stage {stage}")
        anew = f"{self.command} --stage {stage} --fresh"
        finished.verify(anew=anew, base_identity=self.base_identity)
        return finished.artifacts

    def _given(self, key: str, path: Path | None) -> Artifact | None:
        return path and brought(path, kind="adapter", key=key, base_identity=self.base_identity)


def artifacts_of(inputs: StageInputs) -> Mapping[str, Artifact | None]:
    """By the names that fingerprints have for them."""
    match inputs:
        case SFTInputs(adapter=adapter):
            return {"adapter": adapter}
        case RewardInputs(sft=sft, adapter=adapter):
            return {"sft": sft, "adapter": adapter}
        case PPOInputs(sft=sft, reward_models=models):
            return {"sft": sft, **_by_member(models)}
        case EvaluationInputs(sft=sft, reward_models=models, policy=policy):
            return {"sft": sft, **_by_member(models), "policy": policy}


def _by_member(models: tuple[RewardModelArtifacts, ...]) -> dict[str, Artifact]:
    members = list(zip(member_suffixes(len(models)), models, strict=True))
    adapters = {f"reward_adapter{suffix}": model.adapter for suffix, model in members}
    return adapters | {f"reward_head{suffix}": model.head for suffix, model in members}


def brought(path: Path, *, kind: str, key: str, base_identity: str | None) -> Artifact:
    """A folder of the user's own. One that we wrote is verified; of any other the contents are hashed.

    Raises:
        ArtifactError: it is not what it should be, is damaged, or was made on another base (if that is given).
    """
    needed = "adapter_config.json" if kind == "adapter" else "*.safetensors"
    if not any(path.glob(needed)):
        raise ArtifactError(f"{key}: {path} holds no {needed}; give a folder in PEFT's format")
    if (path / MANIFEST).exists():
        try:
            found = read_artifact(path)
        except ArtifactError as error:
            raise ArtifactError(f"{key}: {error}; give a whole one") from None
        if base_identity is not None:
            verify_base(found, base_identity)
        return replace(found, kind=kind, stage="brought")
    names = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    digest = sha256_of_json({name: sha256_of_file(path / name) for name in names})
    return Artifact(kind=kind, stage="brought", path=path, step=0, content_hash=digest, base_identity="")


def brought_head(adapter: Path, *, base_identity: str | None) -> Artifact:
    """The scalar head beside a reward adapter that the user brings."""
    head = adapter.parent / "head"
    if not head.is_dir():
        raise ArtifactError(
            f"reward.adapter: {adapter} comes without its scalar head, which is looked for in {head}; put it there, "
            "or put reward into run.stages to train one"
        )
    return brought(head, kind="head", key="reward.adapter", base_identity=base_identity)
