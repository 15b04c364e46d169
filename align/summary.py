"""summary.json and lineage.json, from the finished steps of a run."""

import platform
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

from align.artifacts import Artifact, read_json, write_json
from align.config import Config
from align.errors import ArtifactError
from align.pipeline import StepName, steps_to_do
from align.results import FinishedStep, changed_on_the_way, current_results
from align.worker import Outcome

_SECTIONS = {"sft": "sft", "reward": "reward", "ppo": "ppo", "evaluation": "eval"}
_TOTAL = "install_excluded_total"  # of the seconds
_LIBRARIES = ("torch", "transformers", "trl", "peft", "ray", "datasets", "align")


class Journal:
    """Owns summary.json and lineage.json, rewritten after every step."""

    def __init__(self, config: Config, run: Path, base_identity: str) -> None:
        self._config = config
        self._run = run
        self._base_identity = base_identity
        self._started = time.monotonic()
        self._earlier_seconds = _earlier_seconds(run)
        self._num_run = 0
        self._resumed_seconds = 0.0
        self._standing: set[StepName] = set()
        self.summary: dict[str, object] = {}

    def count(self, step: StepName, outcome: Outcome) -> None:
        """A step that this command has run, or has brought to its end."""
        self._num_run += 1
        self._resumed_seconds += outcome.resumed_seconds
        self._forget(_SECTIONS[step])

    def _forget(self, section: str) -> None:
        self._earlier_seconds[_TOTAL] -= self._earlier_seconds.pop(section, 0.0)

    def record(self, step: StepName) -> None:
        """`step` stands: its result is new, or is kept by this command. Of others those that were made from what
        stands, too, if they are of this config's stages."""
        self._standing.add(step)
        finished = current_results(self._run, steps_to_do(self._config, None), standing=self._standing)
        if self._num_run:  # what no longer stands has taken no time
            for section in {*_SECTIONS.values()} - {_SECTIONS[name] for name in finished}:
                self._forget(section)
        now = time.monotonic() - self._started + self._resumed_seconds
        # Results of earlier commands bring the time that these took; what was run again is not counted twice.
        is_whole = self._num_run == len(finished)
        total = now if is_whole else self._earlier_seconds[_TOTAL] + (now if self._num_run else 0.0)
        self.summary = summarize(
            self._config, finished, base_identity=self._base_identity, total_seconds=round(total, 2)
        )
        write_json(self._run / "summary.json", self.summary)
        write_lineage(self._run, finished)


def _earlier_seconds(run: Path) -> dict[str, float]:
    """By section, and their total. Of a summary that is not there, or not whole, nothing: it is written anew."""
    try:
        said = cast(Any, read_json(run / "summary.json"))["seconds"]
        return {_TOTAL: 0.0, **{str(name): float(value) for name, value in said.items()}}
    except (ArtifactError, KeyError, TypeError, ValueError, AttributeError):
        return {_TOTAL: 0.0}


def summarize(
    config: Config, finished: Mapping[str, FinishedStep], *, base_identity: str, total_seconds: float
) -> dict[str, object]:
    """The numbers of a run, nested. Steps that have not finished have no section."""
    vitals = [step.vitals for step in finished.values()]
    seconds: dict[str, float] = {_TOTAL: total_seconds}
    summary: dict[str, object] = {
        "run": {"name": config.run.name, "seed": config.run.seed, "steps": list(finished)},
        "base": {
            "model": config.base.model,
            "identity": base_identity,
            "dtype": next((v.base_dtype for v in vitals), None),  # what base.dtype came to
            "loads": max((v.base_loads for v in vitals), default=0),
            "unchanged": all(v.base_unchanged for v in vitals),
        },
        "seconds": seconds,
        "peak_rss_bytes": max((v.peak_rss_bytes for v in vitals), default=0),
    }
    device_bytes = [v.peak_device_memory_bytes for v in vitals if v.peak_device_memory_bytes is not None]
    if device_bytes:
        summary["peak_device_memory_bytes"] = max(device_bytes)
    summary["memory"] = {
        _SECTIONS[name]: {"forecast_bytes": step.vitals.forecast_bytes, "peak_bytes": step.vitals.peak_bytes}
        for name, step in finished.items()
        if step.vitals.forecast_bytes is not None
    }
    for name, step in finished.items():
        summary[_SECTIONS[name]] = dict(step.metrics)
        seconds[_SECTIONS[name]] = step.vitals.seconds
    return summary


def write_lineage(run: Path, finished: Mapping[str, FinishedStep]) -> None:
    """What each result was made from and with: inputs by hash, data by hash and account, settings by name."""

    def describe(artifact: Artifact) -> dict[str, object]:
        path = artifact.path.relative_to(run).as_posix()
        return {"kind": artifact.kind, "path": path, "step": artifact.step, "sha256": artifact.content_hash}

    steps = {
        name: {
            "fingerprint": step.fingerprint,
            "in": {key: value for key, value in step.fingerprint.items() if key.startswith(("input.", "data."))},
            "out": [describe(artifact) for artifact in step.artifacts],
            "accounts": step.accounts,
            **({"changed_on_the_way": changed} if (changed := changed_on_the_way(run / name)) else {}),
        }
        for name, step in finished.items()
    }
    write_json(run / "lineage.json", {"versions": _versions(), "steps": steps})


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found
