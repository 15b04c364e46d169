"""What is in a verified data set: counts, lengths, biases and a few rows, from one pass over its shards.

Memory does not grow with the texts: one batch is held at a time, and of what went before only counts (of lengths, and
of prompts by 8-byte keys: some 100 bytes a distinct one), margins and the records of at most three rows a split.
"""

from array import array
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from heapq import nsmallest
from itertools import zip_longest
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import numpy as np

from align.artifacts import read_artifact, read_json
from align.errors import ArtifactError
from align.statistics import wilson_interval
from data.formats import parse_row
from data.ingestion.parts import Part, encoded_parts, part_lengths, plain_parts, text_runs, token_runs
from data.records import (
    Comparison,
    Demonstration,
    PlainText,
    Record,
    RecordKind,
    Reject,
    UnfitError,
    Verdict,
    parts_of,
)
from data.sources import has_split, is_dataset, iterate_rows
from data.splits import normalized_prompt, prompt_key
from data.tokenization import Codec, OnProgress

_NUM_EXAMPLES = 3
_MOST_FREQUENT = 10
_EXCERPT = 80  # characters of a prompt that occurs twice


@dataclass(frozen=True)
class Share:
    count: int
    total: int
    share: float | None  # None where there is nothing to have a share of
    interval: tuple[float, float] | None  # 95 %, Wilson

    @staticmethod
    def of(count: int, total: int) -> "Share":
        return Share(count, total, *((count / total, wilson_interval(count, total)) if total else (None, None)))


@dataclass(frozen=True)
class Distribution:
    rows: int
    mean: float
    p50: int  # at least half of the rows are no longer: a length that occurs, never one between two
    p95: int
    p99: int
    max: int

    @staticmethod
    def of(counts: Counter[int]) -> "Distribution":
        """`counts`: how many rows have each length."""
        lengths, rows = list(counts), list(counts.values())
        mean = sum(length * count for length, count in counts.items()) / sum(rows)
        p50, p95, p99 = map(int, np.quantile(lengths, [0.5, 0.95, 0.99], method="inverted_cdf", weights=rows))
        return Distribution(sum(rows), mean, p50, p95, p99, max(lengths))


@dataclass(frozen=True)
class FrequentPrompt:
    rows: int
    excerpt: str


@dataclass(frozen=True)
class PromptCounts:
    distinct: int
    most_frequent: tuple[FrequentPrompt, ...]  # those that occur twice or more, the most frequent first


@dataclass(frozen=True)
class SourceRows:
    name: str
    shape: str  # the format that its rows had
    rows_in: int
    kept: int
    rejected: int
    splits: Mapping[str, int]  # rows in each


@dataclass(frozen=True)
class Contents:
    """What the folder's own account says, and the rows that were found."""

    kind: str
    content_hash: str
    rows_in: int
    kept: int
    rejected: Mapping[str, int]  # by reason
    splits: Mapping[str, int]
    sources: tuple[SourceRows, ...]


@dataclass(frozen=True)
class Margins:
    rows: int  # that have one
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Example:
    split: str
    source: str
    content_hash: str
    parts: tuple[Part, ...]
    refusal: str | None  # why the codec could not encode it; its parts are then as without a codec


@dataclass(frozen=True)
class Inspection:
    """Units are "characters" (of contents, without the template) and, with a codec, "tokens" (with it)."""

    contents: Contents
    turns: Mapping[int, int]  # how many rows have so many prompt turns, the system's left out; 0: plain text
    with_system: int  # rows that bring a system message
    lengths: Mapping[str, Mapping[str, Distribution]]  # by unit and part; "row": the prompt and its longest response
    max_length: int | None
    over_length: Share | None  # rows of more than max_length tokens; None without one
    not_encodable: Mapping[str, int]  # by reason; these rows are not in "tokens"
    length_bias: Mapping[str, Share]  # by unit: the longer one is preferred, of pairs that differ and are no tie
    ties: Share | None  # comparisons only
    preferred_rejected: int  # comparisons with a preference under 0.5
    margins: Margins | None  # None also if no row has one
    labels: Share | None  # verdicts only: the good ones
    prompts: PromptCounts
    examples: tuple[Example, ...]


def inspect_dataset(
    folder: Path, *, codec: Codec | None, max_length: int | None = None, on_progress: OnProgress | None = None
) -> Inspection:
    """Verify the folder, then read all of it. ArtifactError if it is no data set, or not as it was written."""
    content_hash, described, account = _verified(folder)
    splits = cast(Mapping[str, int], described["splits"])
    tally = _Tally(described["kind"], codec, max_length)
    done, total = 0, sum(splits.values())
    for split in splits:
        for _, row in iterate_rows(folder, limit=None, split=split) if has_split(folder, split) else ():
            tally.add(split, cast(Mapping[str, Any], row))
            done += 1
            if on_progress is not None and (done % 1024 == 0 or done == total):
                on_progress(done, total)
    shapes = cast(Mapping[str, str], described["shapes"])
    sources = tuple(
        SourceRows(
            name,
            shapes.get(name, ""),
            own["rows_in"],
            own["kept"],
            sum(own["rejected"].values()),
            {split: tally.rows[split, name] for split in splits},
        )
        for name, own in cast(Mapping[str, Mapping[str, Any]], account["sources"]).items()
    )
    total_counts = account["rows_in"], account["kept"], account["rejected"]
    return tally.inspection(Contents(tally.kind, content_hash, *total_counts, splits, sources))


def _verified(folder: Path) -> tuple[str, Mapping[str, Any], Mapping[str, Any]]:
    """(content hash, dataset.json, account.json)"""
    if not is_dataset(folder):
        what = "a file" if folder.is_file() else "no folder that exists"
        what = "a folder without dataset.json" if folder.is_dir() else what
        raise ArtifactError(
            f"{folder} is not a data set of `align ingest`, but {what}; make one: align ingest SOURCE --to FOLDER"
        )
    try:
        artifact = read_artifact(folder)
    except ArtifactError as error:
        raise ArtifactError(f"{error}; ingest its sources again (`align ingest`)") from None
    described, account = (cast(dict[str, Any], read_json(folder / f"{name}.json")) for name in ("dataset", "account"))
    return artifact.content_hash, described, account


def _record(kind: RecordKind, row: Mapping[str, Any]) -> Record:
    record = parse_row(row, f"{row['source']}:{row['line']}", kind)
    if isinstance(record, Reject):
        raise ArtifactError(f"{record.source} is no {kind} ({record.reason}), which an older align may have let in")
    return record


class _Tally:
    """Everything counted so far."""

    def __init__(self, kind: RecordKind, codec: Codec | None, max_length: int | None) -> None:
        self.kind: RecordKind = kind
        self.rows: Counter[tuple[str, str]] = Counter()  # (split, source)
        self._codec, self._max_length = codec, max_length
        self._counts: Counter[str] = Counter()
        self._turns: Counter[int] = Counter()
        self._refused: Counter[str] = Counter()
        units = ("characters",) if codec is None else ("characters", "tokens")
        self._lengths = {unit: defaultdict[str, Counter[int]](Counter) for unit in units}
        self._margins = array("d")
        self._prompts: Counter[int] = Counter()
        self._excerpts: dict[int, str] = {}  # of those that have come twice
        self._firsts: dict[str, list[tuple[str, str, Record]]] = {}  # by split: (content hash, source, record)

    def add(self, split: str, row: Mapping[str, Any]) -> None:
        record = _record(self.kind, row)
        self.rows[split, row["source"]] += 1
        turns, _ = parts_of(record)
        turns = turns[:-1] if isinstance(record, Demonstration) else turns  # what comes before the (last) answer
        self._turns[sum(turn.role != "system" for turn in turns)] += 1
        self._counts["with system"] += any(turn.role == "system" for turn in turns)
        asked = record.text if isinstance(record, PlainText) else turns[-1].content
        self._count_prompt(prompt_key(normalized_prompt(record), 0), asked[:_EXCERPT])
        self._measure("characters", record, part_lengths(text_runs(record)))
        if self._codec is not None:
            try:
                self._measure("tokens", record, part_lengths(token_runs(self._codec, record)))
            except UnfitError as error:
                self._refused[error.reason] += 1
        if isinstance(record, Comparison):
            self._counts["ties"] += record.preference == 0.5
            self._counts["preferred rejected"] += record.preference < 0.5
            self._margins.extend(() if record.margin is None else (record.margin,))
        self._counts["good"] += isinstance(record, Verdict) and record.is_good
        firsts = [*self._firsts.get(split, ()), (str(row["content_hash"]), record.source, record)]
        self._firsts[split] = sorted(firsts, key=lambda first: first[:2])[:_NUM_EXAMPLES]

    def _measure(self, unit: str, record: Record, lengths: Mapping[str, int]) -> None:
        row = lengths.get("prompt", 0) + max((n for name, n in lengths.items() if name != "prompt"), default=0)
        for name, length in {**lengths, "row": row}.items():
            self._lengths[unit][name][length] += 1
        if unit == "tokens" and self._max_length is not None:
            self._counts["over length"] += row > self._max_length
        if isinstance(record, Comparison) and record.preference != 0.5 and lengths["chosen"] != lengths["rejected"]:
            is_chosen_longer = lengths["chosen"] > lengths["rejected"]
            self._counts[f"{unit}: differ"] += 1
            self._counts[f"{unit}: longer preferred"] += is_chosen_longer == (record.preference > 0.5)

    def _count_prompt(self, key: int, excerpt: str) -> None:
        self._prompts[key] += 1
        if self._prompts[key] == 2:
            self._excerpts[key] = excerpt

    def _most_frequent(self) -> tuple[FrequentPrompt, ...]:
        repeated = [(-self._prompts[key], key) for key in self._excerpts]
        return tuple(FrequentPrompt(-count, self._excerpts[key]) for count, key in nsmallest(_MOST_FREQUENT, repeated))

    def inspection(self, contents: Contents) -> Inspection:
        counts, total, is_pairs = self._counts, self.rows.total(), self.kind == "comparison"
        margins = self._margins
        bias = {u: Share.of(counts[f"{u}: longer preferred"], counts[f"{u}: differ"]) for u in self._lengths}
        has_limit = self._max_length is not None and self._codec is not None
        return Inspection(
            contents=contents,
            turns=dict(sorted(self._turns.items())),
            with_system=counts["with system"],
            lengths={u: {name: Distribution.of(own) for name, own in of.items()} for u, of in self._lengths.items()},
            max_length=self._max_length,
            over_length=Share.of(counts["over length"], total - self._refused.total()) if has_limit else None,
            not_encodable=dict(sorted(self._refused.items())),
            length_bias=bias if is_pairs else {},
            ties=Share.of(counts["ties"], total) if is_pairs else None,
            preferred_rejected=counts["preferred rejected"],
            margins=Margins(len(margins), fmean(margins), min(margins), max(margins)) if margins else None,
            labels=Share.of(counts["good"], total) if self.kind == "verdict" else None,
            prompts=PromptCounts(len(self._prompts), self._most_frequent()),
            examples=self._examples(),
        )

    def _examples(self) -> tuple[Example, ...]:
        """In turn from each split, by content hash: the same rows whatever the order and the number of shards."""
        labelled = ([(split, *first) for first in firsts] for split, firsts in self._firsts.items())
        rounds = [first for together in zip_longest(*labelled) for first in together if first is not None]
        examples: list[Example] = []
        for split, content_hash, source, record in rounds[:_NUM_EXAMPLES]:
            refusal, parts = None, plain_parts(record)
            if self._codec is not None:
                try:
                    parts = encoded_parts(self._codec, record)
                except UnfitError as error:
                    refusal = f"{error.reason}: {error.detail}"
            examples.append(Example(split, source, content_hash, parts, refusal))
        return tuple(examples)
