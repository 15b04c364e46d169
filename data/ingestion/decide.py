"""What rows are together: duplicates, contradictions, prompts on both sides, shares of sources. From keys, not texts.

Rows are numbered in the order of the sources, files and lines; of equal rows the first is kept.
"""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.ingestion.near import PROMPT, REST, SLOTS, Rows, Signatures, are_alike, candidates
from data.ingestion.rules import (
    ACROSS_ROWS,
    CONTRADICTORY,
    DUPLICATE,
    LEAKAGE,
    NEAR_DUPLICATE,
    NEAR_LEAKAGE,
    NOT_DRAWN,
    SetRules,
)
from data.ingestion.sift import KEYS, Sifted

ROWS_IN_MEMORY = 4_000_000  # whose keys are looked at together; past it, prompts are taken in parts
KEPT = -1


@dataclass(frozen=True)
class Decisions:
    """One entry a row."""

    reason: NDArray[np.int8]  # an index into rules.ACROSS_ROWS, or KEPT
    is_held_out: NDArray[np.bool_]

    def reject(self, rows: Rows, why: str) -> None:
        """Those of them that are still kept."""
        self.reason[rows] = np.where(self.reason[rows] == KEPT, ACROSS_ROWS.index(why), self.reason[rows])


def decide(sifted: Sequence[Sifted], rules: SetRules, *, rows_in_memory: int = ROWS_IN_MEMORY) -> Decisions:
    starts = np.cumsum([0, *(one.kept for one in sifted)])
    total = int(starts[-1])
    decisions = Decisions(np.full(total, KEPT, np.int8), np.zeros(total, bool))
    has_own_held_out = any(one.piece.source.is_held_out for one in sifted)
    for one, start in zip(sifted, starts, strict=False):
        drawn = _keys(one)["prompt"] < np.uint64(int(rules.held_out_fraction * 2**64))
        decisions.is_held_out[start : start + one.kept] = one.piece.source.is_held_out if has_own_held_out else drawn
    parts = -(-total // rows_in_memory)
    for part in range(parts):  # equal rows and opposite pairs have the same prompt, so they fall into one part
        rows, keys = [np.zeros(0, np.int64)], [np.zeros(0, KEYS)]
        for one, start in zip(sifted, starts, strict=False):
            own = _keys(one)
            chosen = np.flatnonzero(own["prompt"] % np.uint64(parts) == part)
            rows.append(start + chosen)
            keys.append(own[chosen])
        _decide_part(np.concatenate(keys), np.concatenate(rows), decisions)
    if rules.near_threshold is not None and total:
        _decide_near(_gather(sifted, total), decisions, rules.near_threshold)
    if rules.weights:
        _draw(sifted, starts, decisions, rules.weights)
    return decisions


def _keys(sifted: Sifted) -> NDArray[np.void]:
    return np.fromfile(sifted.piece.path("keys"), KEYS)


def _decide_part(keys: NDArray[np.void], rows: Rows, decisions: Decisions) -> None:
    is_held_out = decisions.is_held_out[rows]
    # A held-out row is the first of its equals, wherever it stands: else the leak would be what is kept
    order = np.lexsort((rows, ~is_held_out, keys["content"]))
    is_again = np.zeros(len(rows), bool)
    is_again[order[1:]] = keys["content"][order[1:]] == keys["content"][order[:-1]]
    decisions.reject(rows[is_again], DUPLICATE)
    decisions.reject(rows[_is_contradicted(keys, ~is_again)], CONTRADICTORY)
    held_out = np.unique(keys["prompt"][is_held_out & (decisions.reason[rows] == KEPT)])
    decisions.reject(rows[~is_held_out & np.isin(keys["prompt"], held_out)], LEAKAGE)


def _is_contradicted(keys: NDArray[np.void], is_counted: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Rows of one pair of which some say A over B and others B over A: nobody knows which are right."""
    pairs, group = np.unique(keys["pair"], return_inverse=True)
    says = np.zeros((2, len(pairs)), bool)
    for side, value in enumerate((1, -1)):
        says[side, group[is_counted & (keys["side"] == value)]] = True
    return is_counted & (says[0] & says[1])[group] & (keys["side"] != 0)


def _gather(sifted: Sequence[Sifted], total: int) -> Signatures:
    """All signatures as one file: the system keeps of it in memory what fits."""
    path = sifted[0].piece.folder / "near.all"
    with path.open("wb") as whole:
        for one in sifted:
            with one.piece.path("near").open("rb") as own:
                shutil.copyfileobj(own, whole)
    return np.memmap(path, np.uint32, "r", shape=(total, 2, SLOTS))


def _decide_near(signatures: Signatures, decisions: Decisions, threshold: float) -> None:
    rank = np.where(decisions.is_held_out, 0, len(signatures)) + np.arange(len(signatures))  # held-out rows come first

    def alike(which: int) -> Iterator[tuple[Rows, Rows]]:
        live = np.flatnonzero(decisions.reason == KEPT)
        for own, other in candidates(signatures, which, rank, threshold=threshold, among=live):
            is_near = are_alike(signatures, which, own, other, threshold=threshold)
            yield own[is_near], other[is_near]

    pairs = [np.stack(pair) for pair in alike(REST)]
    own, other = np.unique(np.concatenate(pairs, axis=1), axis=1)
    is_near = are_alike(signatures, PROMPT, own, other, threshold=threshold)
    own, other = own[is_near], other[is_near]
    for index in np.argsort(rank[own], kind="stable"):  # what is like a row that is rejected itself stays
        if decisions.reason[other[index]] == KEPT:
            decisions.reject(own[index : index + 1], NEAR_DUPLICATE)
    for own, other in alike(PROMPT):
        decisions.reject(own[~decisions.is_held_out[own] & decisions.is_held_out[other]], NEAR_LEAKAGE)


def _draw(sifted: Sequence[Sifted], starts: Rows, decisions: Decisions, weights: Sequence[float]) -> None:
    """Of each source's kept rows as many as its weight allows, so that the scarcest is used whole; those with the
    smallest content keys, which is as good as by lot, and the same each time."""
    keys = np.concatenate([_keys(one)["content"] for one in sifted])
    sources = np.repeat([one.piece.source.source for one in sifted], np.diff(starts))
    live = [np.flatnonzero((sources == number) & (decisions.reason == KEPT)) for number in range(len(weights))]
    unit = min(len(rows) / weight for rows, weight in zip(live, weights, strict=True))
    for rows, weight in zip(live, weights, strict=True):
        order = np.lexsort((rows, keys[rows]))
        decisions.reject(rows[order[round(unit * weight) :]], NOT_DRAWN)
