"""Counts that take bounded memory, however many rows are counted."""

import hashlib
from collections import Counter
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Distribution:
    rows: int
    mean: float
    p50: int  # at least half of the rows are no longer: a length that occurs, never one between two
    p95: int
    p99: int
    max: int


class Histogram:
    """Of lengths: exact below 65,536; longer ones are rounded down by less than one part in 32,768.

    So at most 32,768 bins are added for each doubling. Mean and maximum are exact.
    """

    def __init__(self) -> None:
        self._bins: Counter[int] = Counter()
        self._sum = self._max = 0

    def add(self, length: int) -> None:
        shift = max(0, length.bit_length() - 16)
        self._bins[length >> shift << shift] += 1
        self._sum += length
        self._max = max(self._max, length)

    def distribution(self) -> Distribution:
        lengths = sorted(self._bins)
        rows_up_to = np.cumsum([self._bins[length] for length in lengths])
        rows = int(rows_up_to[-1])
        ranks = [-(-percent * rows // 100) for percent in (50, 95, 99)]  # rounded up, in whole numbers
        p50, p95, p99 = (lengths[int(index)] for index in np.searchsorted(rows_up_to, ranks))
        return Distribution(rows, self._sum / rows, p50, p95, p99, self._max)


@dataclass(frozen=True)
class FrequentPrompt:
    rows: int
    excerpt: str


@dataclass(frozen=True)
class PromptCounts:
    distinct: int | None  # None: too many to be counted
    undercount: int  # 0: the counts below are exact; else each is too low by this at most
    most_frequent: tuple[FrequentPrompt, ...]  # those that occur twice or more, the most frequent first


class PromptCounter:
    """How often each prompt occurs, by 16-byte hashes: exact until there are 2 · `capacity` distinct ones.

    Then, and whenever they are that many again, the count of the one that is number `capacity` + 1 is taken off all
    of them, and those without a count left are dropped: Misra and Gries (1982), in the form of Agarwal et al.,
    Mergeable Summaries (2012). A count is never too high, and too low by rows / `capacity` at most.
    """

    def __init__(self, capacity: int = 100_000) -> None:
        self._capacity = capacity
        self._counts: Counter[bytes] = Counter()
        self._excerpts: dict[bytes, str] = {}  # of those that have come twice
        self._undercount = 0

    def add(self, prompt: str, excerpt: str) -> None:
        key = hashlib.blake2b(prompt.encode(), digest_size=16).digest()
        self._counts[key] += 1
        if self._counts[key] == 2:
            self._excerpts[key] = excerpt
        if len(self._counts) >= 2 * self._capacity:
            self._shrink()

    def _shrink(self) -> None:
        taken_off = sorted(self._counts.values(), reverse=True)[self._capacity]
        self._counts = Counter({key: count - taken_off for key, count in self._counts.items() if count > taken_off})
        self._excerpts = {key: text for key, text in self._excerpts.items() if key in self._counts}
        self._undercount += taken_off

    def result(self, most: int = 10) -> PromptCounts:
        repeated = [(-count, key) for key, count in self._counts.items() if count > 1]
        frequent = tuple(FrequentPrompt(-count, self._excerpts[key]) for count, key in sorted(repeated)[:most])
        return PromptCounts(None if self._undercount else len(self._counts), self._undercount, frequent)
