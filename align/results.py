"""What a step leaves in its folder: result.json when it has finished, started.json from its beginning on."""

import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

from align.artifacts import (
    Artifact,
    read_artifact,
    read_json,
    verify_base,
    write_json,
    writing,
)
from align.errors import ArtifactError

RESULT = "result.json"
_CHANGED = "changed.json"
# Which step makes an input of another.
_MAKERS = {"sft": "sft", "reward_adapter": "reward", "reward_head": "reward", "policy": "ppo"}


@dataclass(frozen=True)
class Vitals:
    """What a step cost, and what became of the base."""

    seconds: float
    peak_rss_bytes: int  # of the worker's process in this step, and in loading before its first
    peak_device_memory_bytes: int | None
    base_loads: int
    base_unchanged: bool
    base_dtype: str  # what base.dtype came to
    imports_rss_bytes: int  # of the process before it loaded the base
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

    def verify(self, *, anew: str, base_identity: str | None = None) -> None:
        """ArtifactError if an artifact is damaged, is not the one that the step made, or is of another base. `anew` is
        the command that makes it again."""
        for artifact in self.artifacts:
            try:
                found = read_artifact(artifact.path)
            except ArtifactError as error:
                raise ArtifactError(f"{error}; make it again: {anew}") from None
            if found.content_hash != artifact.content_hash:
                raise ArtifactError(
                    f"{artifact.path} is not what its stage made (hash {found.content_hash[:12]}…, expected "
                    f"{artifact.content_hash[:12]}…); make it again: {anew}"
                )
            if base_identity is not None:
                verify_base(found, base_identity)


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
    """The finished steps, less those that were made from artifacts which have since been replaced, or are being made
    again, unless they are `standing` all the same."""
    found: dict[str, FinishedStep] = {}
    for step in steps:
        finished = read_finished(run / step)
        if finished is None:
            continue
        hashes = {maker: {artifact.content_hash for artifact in of.artifacts} for maker, of in found.items()}
        is_current = all(
            content_hash is None or content_hash in hashes.get(maker, ())
            for key, content_hash in finished.fingerprint.items()
            if (maker := maker_of(key)) is not None and maker in steps
        )
        if is_current or step in standing:
            found[step] = finished
    return found


def maker_of(key: str) -> str | None:
    """Which step makes the input that a fingerprint's key names; None for other keys, and for what users bring."""
    name = key.removeprefix("input.").partition("-")[0]
    return _MAKERS.get(name) if key.startswith("input.") else None


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
            else:
                path.unlink()
    if changed:
        write_json(folder / _CHANGED, [*changed_on_the_way(folder), changed])
    write_json(folder / "started.json", fingerprint)


def changed_on_the_way(folder: Path) -> list[str]:
    """What the resumes of a step have found changed, and were allowed to."""
    path = folder / _CHANGED
    return cast("list[str]", read_json(path)) if path.exists() else []
