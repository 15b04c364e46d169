"""What a stage is given and gives back: the few shared handles, the records of inputs, the record of results."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from align.artifacts import Artifact, write_directory, writing
from align.config import RewardsConfig, RolloutConfig
from align.errors import DIVERGED, DataError, InvariantError, StoppedError
from align.lengths import fitting_length
from align.stopping import is_asked_to_stop
from align.tracking import Tracker
from data.records import Account, Comparison, Demonstration, PlainText, Prompt, Reject, Verdict
from data.rejects import check_rate, describe, write_rejects

if TYPE_CHECKING:
    from align.adapters import AdaptedModel  # the driver builds inputs from these records without torch


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn. Logprobs are of the untruncated softmax at `temperature`, whatever top_k and top_p."""

    temperature: float
    max_response_length: int  # tokens
    max_prompt_length: int  # tokens
    batch_size: int  # episodes generated side by side
    top_k: int = 0
    top_p: float = 1.0
    min_response_length: int = 0

    @staticmethod
    def of(rollout: RolloutConfig) -> "Sampling":
        return Sampling(**{name: getattr(rollout, name) for name in Sampling.__dataclass_fields__})


@dataclass(frozen=True)
class StageContext:
    """The shared handles. `seed` is the stage's own, made from (run seed, stage name)."""

    model: "AdaptedModel"
    tracker: Tracker
    folder: Path  # this stage's folder in the run
    seed: int
    system_prompt: str | None
    max_reject_rate: float
    resume: bool = False
    split: int = 1  # parts that a micro-batch is computed in, since memory did not do for it whole; divides its size

    def stop_if_asked(self, save: Callable[[], None] = lambda: None) -> None:
        """StoppedError if the driver has asked for it, once `save` has kept what else would be lost."""
        if is_asked_to_stop(self.folder.parent):
            save()
            raise StoppedError(f"{self.folder.name} stopped as it was asked to")

    def progress(self, doing: str) -> Callable[[int, int], None]:
        """Takes (done, total), and heeds the driver: StoppedError if it has asked to stop."""

        def on_progress(done: int, total: int) -> None:
            self.stop_if_asked()
            self.tracker.progress(done, total, doing)

        return on_progress

    def part_of(self, batch_size: int) -> int:
        """What is computed at once of a batch."""
        return max(1, batch_size // self.split)

    def fitting_length(self, key: str, length: int, *, reserved: int = 0) -> int:
        """As `align.lengths` has it for the base's context; a length that is less than the setting's is told."""
        context_length = self.model.base.context_length
        fitting = fitting_length(length, context_length, reserved=reserved)
        if fitting < length:
            beside = f" beside a response of {reserved}" if reserved else ""
            logging.getLogger(__name__).warning(
                "%s is %d, more than the base's context of %d tokens has%s: %d is used",
                *(key, length, context_length, beside, fitting),
            )
        return fitting

    def fitting_sampling(self, sampling: Sampling) -> Sampling:
        """What memory and the base's context have room for."""
        length = self.fitting_length(
            "ppo.rollout.max_prompt_length", sampling.max_prompt_length, reserved=sampling.max_response_length
        )
        return replace(sampling, batch_size=self.part_of(sampling.batch_size), max_prompt_length=length)

    def load_sft(self, artifact: Artifact | None) -> None:
        """Add the `sft` adapter; where there is none a zero one, so that there is one code path."""
        if artifact is None:
            self.model.add("sft", seed=self.seed)
        else:
            self.model.load("sft", artifact.path)

    def write(self, name: str, kind: str, fill: Callable[[Path], None], *, step: int) -> Artifact:
        """Let `fill` write an artifact of this stage into its folder."""
        base, stage = self.model.base_identity, self.folder.name
        return write_directory(self.folder / name, fill, kind=kind, stage=stage, step=step, base_identity=base)

    def set_aside(
        self, what: str, rows_in: int, rejects: list[Reject], *, cuts: Sequence[int] = (), limit: str = ""
    ) -> Account:
        """Account for rows that did not fit once they were tokenized: into <stage>/rejects-<what>-tokens.jsonl.

        Args:
            cuts: how many tokens each row that is kept has lost at its beginning, to `limit` ("sft.max_length 512").

        Raises:
            DataError: more than data.max_reject_rate of them, or none is left.
        """
        account = Account.of(rows_in, rejects, cut=sum(cut > 0 for cut in cuts))
        logging.getLogger(__name__).info("%s: %s, once tokenized: %s", self.folder.name, what, describe(account))
        path = self.folder / f"rejects-{what}-tokens.jsonl"
        with writing(path):
            write_rejects(path, rejects)
        check_rate(account, rejects, max_rate=self.max_reject_rate, what=f"{what} (tokenized)", rejects_path=path)
        if account.kept == 0:
            raise DataError(f"{what}: no row is left after tokenization: {describe(account)}; see {path}")
        if account.cut:
            logging.getLogger(__name__).warning(
                "%s: %s: %d of %d rows are longer than %s and lose their beginning, a system message first (up to %d "
                "tokens)",
                *(self.folder.name, what, account.cut, account.kept, limit, max(cuts)),
            )
        return account


@dataclass(frozen=True)
class SFTInputs:
    train: tuple[Demonstration | PlainText, ...]
    held_out: tuple[Demonstration | PlainText, ...]
    adapter: Artifact | None = None  # brought by the user, to start from


@dataclass(frozen=True)
class RewardInputs:
    sft: Artifact | None  # None: a zero sft adapter
    train: tuple[Comparison, ...] | tuple[Verdict, ...]  # verdicts for reward.objective.kind unpaired
    held_out: tuple[Comparison, ...] | tuple[Verdict, ...]
    sampling: Sampling  # of the SFT responses that the score's mean and spread are measured on
    adapter: Artifact | None = None  # brought by the user, to start from


def member_suffixes(count: int) -> list[str]:
    """What the names of an ensemble's members end in: nothing for the only one, else "-1", "-2" and so on."""
    return [""] if count == 1 else [f"-{number}" for number in range(1, count + 1)]


@dataclass(frozen=True)
class RewardModelArtifacts:
    adapter: Artifact
    head: Artifact


@dataclass(frozen=True)
class PPOInputs:
    sft: Artifact | None
    reward_models: tuple[RewardModelArtifacts, ...]  # several are an ensemble; none: other sources score
    prompts: tuple[Prompt, ...]
    held_out: tuple[Prompt, ...] = ()  # what the guard looks at
    ptx: tuple[Demonstration | PlainText, ...] = ()


@dataclass(frozen=True)
class EvaluationInputs:
    sft: Artifact | None
    policy: Artifact
    reward_models: tuple[RewardModelArtifacts, ...]
    rewards: RewardsConfig  # the sources, as in PPO
    prompts: tuple[Prompt, ...]  # held out
    sampling: Sampling


@dataclass(frozen=True)
class StageResult:
    """`metrics` is JSON: reproducible values only, no clocks. `account` counts the rows that the stage itself set
    aside once they were tokenized.

    Raises:
        InvariantError: a metric is not finite, so what has been trained cannot be used.
    """

    stage: str
    artifacts: tuple[Artifact, ...]
    metrics: Mapping[str, object]
    account: Account | None = None

    def __post_init__(self) -> None:
        numbers = {name: value for name, value in self.metrics.items() if isinstance(value, float)}
        bad = {name: value for name, value in numbers.items() if not math.isfinite(value)}
        if bad:
            raise InvariantError(f"{self.stage}: not finite at its end: {bad}; {DIVERGED}")

    def artifact(self, kind: str) -> Artifact:
        return next(artifact for artifact in self.artifacts if artifact.kind == kind)
