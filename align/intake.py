"""The data of a run, read and split in the driver before Ray starts, with an account of every row."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from align.artifacts import writing
from align.config import Config, DatasetConfig, SourceConfig, StageName
from align.errors import DataError
from data.records import Account, Demonstration, PlainText, Record, RecordKind, Reject
from data.rejects import check_rate, describe, write_rejects
from data.sources import Reading, has_split, read_records
from data.splits import shared_prompts, split_by_prompt

REJECTS = "rejects.jsonl"


@dataclass(frozen=True)
class StageData:
    """`parts` goes into fingerprints: the content hashes by dotted key, or what else decides the split."""

    train: tuple[Record, ...]
    held_out: tuple[Record, ...]
    accounts: Mapping[str, Account]
    parts: Mapping[str, object]
    ptx: tuple[Demonstration | PlainText, ...] = ()  # of ppo
    rejects: tuple[Reject, ...] = ()  # of all sources


def kind_of(config: Config, stage: StageName) -> RecordKind:
    """Which records a stage's data is read as."""
    if stage == "reward":
        return "verdict" if config.reward.objective.kind == "unpaired" else "comparison"
    return "demonstration" if stage == "sft" else "prompt"


def held_out_of(section: DatasetConfig) -> SourceConfig | None:
    """The held-out source: the one given, or the other split of a data set of `align ingest`."""
    train = section.train
    if section.held_out is None and train.path is not None and has_split(train.path, "held_out"):
        return train.model_copy(update={"split": "held_out", "limit": None})
    return section.held_out


def read_stage_data(config: Config, stage: StageName, run: Path, note: Callable[[str], None]) -> StageData:
    """Both sides of a stage's data.

    Raises:
        DataError: a source cannot be read, or too many of its rows do not fit: these are in the stage's rejects.jsonl.
    """
    section: DatasetConfig = getattr(config.data, stage)  # Config has seen to it that there is one
    key = f"data.{stage}"
    kind, held_out_source = kind_of(config, stage), held_out_of(section)
    readings: dict[str, Reading[Record]] = {f"{key}.train": read_records(section.train, kind)}
    if held_out_source is not None:
        readings[f"{key}.held_out"] = read_records(held_out_source, kind)
    if stage == "ppo" and config.data.ptx is not None:
        readings["data.ptx"] = read_records(config.data.ptx, "demonstration")
    rejects = [reject for reading in readings.values() for reject in reading.rejects]
    for name, reading in readings.items():
        note(f"{name}: {describe(reading.account)}")
        try:
            limit, path = config.data.max_reject_rate, run / stage / REJECTS
            check_rate(reading.account, reading.rejects, max_rate=limit, what=name, rejects_path=path)
        except DataError:
            keep_rejects(run / stage, rejects)
            raise
    parts: dict[str, object] = {name: reading.content_hash for name, reading in readings.items()}
    train, held_out = readings[f"{key}.train"].records, ()
    if held_out_source is None:
        fraction = section.held_out_fraction
        train, held_out = split_by_prompt(train, held_out_fraction=fraction, seed=config.run.seed)
        parts[f"{key}.held_out_fraction"] = fraction
        note(f"{key}: {len(held_out):,} of them are held out, by prompt (held_out_fraction {fraction:g})")
    else:
        held_out = readings[f"{key}.held_out"].records
        shared = shared_prompts(train, held_out)
        if shared:
            note(
                f"warning: {shared} held-out prompts of {key} also occur in its train data: measured on them, a gain "
                "is not one"
            )
    ptx = cast("tuple[Demonstration | PlainText, ...]", readings["data.ptx"].records) if "data.ptx" in readings else ()
    accounts = {name: reading.account for name, reading in readings.items()}
    return StageData(train, held_out, accounts, parts, ptx, tuple(rejects))


def keep_rejects(folder: Path, rejects: Sequence[Reject]) -> None:
    """The rows of a stage's data that were set aside, into its folder."""
    with writing(folder / REJECTS):
        write_rejects(folder / REJECTS, rejects)


def parts_of_step(step: str, data: StageData, *, has_guard: bool) -> dict[str, object]:
    """What of the data a step depends on: PPO trains on one side (its guard looks at the other), its evaluation looks
    at the other."""
    unused: set[str] = set()
    if step == "evaluation":
        unused = {"data.ptx"} | ({"data.ppo.train"} if "data.ppo.held_out" in data.parts else set())  # or of one file
    elif step == "ppo" and not has_guard:
        unused = {"data.ppo.held_out"}
    return {key: value for key, value in data.parts.items() if key not in unused}
