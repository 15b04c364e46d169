"""What rows are together: duplicates, contradictions, prompts on both sides, shares of sources. From keys, not texts.

Rows are numbered in the order of the sources, files and lines; of equal rows the first is kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.ingestion.near import PROMPT, REST, SLOTS, Signatures, are_alike, candidates
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
from data.ingestion.sift import Piece

ROWS_IN_MEMORY = 4_000_000  # whose keys are looked at together; past it, prompts are taken in parts
KEPT = -1

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Decisions:
    """One entry a row."""

    reason: NDArray[np.int8]  # an index into rules.ACROSS_ROWS, or KEPT
    is_held_out: NDArray[np.bool_]

    def reject(self, rows: NDArray[np.int64] | NDArray[np.bool_], why: str) -> None:
        """Those of them that are still kept."""
        mask = np.zeros(len(self.reason), bool)
        mask[rows] = True
        self.reason[mask & (self.reason == KEPT)] = ACROSS_ROWS.index(why)


def decide(pieces: Sequence[Piece], rules: SetRules, *, rows_in_memory: int = ROWS_IN_MEMORY) -> Decisions:
    files = [np.load(piece.path("keys.npy"), mmap_mode="r") for piece in pieces]
    starts = np.cumsum([0, *map(len, files)])
    total = int(starts[-1])
    decisions = Decisions(np.full(total, KEPT, np.int8), np.zeros(total, bool))
    sources = np.concatenate([np.full(len(f), p.source.source, np.int32) for f, p in zip(files, pieces, strict=True)])
    has_own_held_out = any(piece.source.is_held_out for piece in pieces)
    for piece, keys, start in zip(pieces, files, starts, strict=False):
        drawn = keys["prompt"] < np.uint64(int(rules.held_out_fraction * 2**64))
        decisions.is_held_out[start : start + len(keys)] = piece.source.is_held_out if has_own_held_out else drawn
    parts = -(-total // rows_in_memory)
    for part in range(parts):  # equal rows and opposite pairs have the same prompt, so they fall into one part
        found = [np.flatnonzero(keys["prompt"] % np.uint64(parts) == part) for keys in files]
        rows = np.concatenate([start + own for own, start in zip(found, starts, strict=False)])
        keys = np.concatenate([keys[own] for keys, own in zip(files, found, strict=True)])
        _decide_part(keys, rows, decisions)
    if rules.near_threshold is not None and total:
        _decide_near(_gather(pieces, total), decisions, rules.near_threshold)
    if rules.weights:
        _draw(files, sources, decisions, rules.weights)
    return decisions


def _decide_part(keys: NDArray[np.void], rows: Rows, decisions: Decisions) -> None:
    is_held_out = decisions.is_held_out[rows]
    # A held-out row is the first of its equals, wherever it stands: else the leak would be what is kept
    order = np.lexsort((rows, ~is_held_out, keys["content"]))
    is_again = np.zeros(len(rows), bool)
    is_again[order[1:]] = keys["content"][order[1:]] == keys["content"][order[:-1]]
    decisions.reject(rows[is_again], DUPLICATE)
    decisions.reject(rows[_is_contradicted(keys, ~is_again)], CONTRADICTORY)
    held_out = np.unique(keys["prompt"][is_held_out])
    decisions.reject(rows[~is_held_out & np.isin(keys["prompt"], held_out)], LEAKAGE)


def _is_contradicted(keys: NDArray[np.void], is_counted: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Rows of one pair of which some say A over B and others B over A: nobody knows which are right."""
    pairs, group = np.unique(keys["pair"], return_inverse=True)
    says = np.zeros((2, len(pairs)), bool)
    for side, value in enumerate((1, -1)):
        says[side, group[is_counted & (keys["side"] == value)]] = True
    return is_counted & (says[0] & says[1])[group] & (keys["side"] != 0)


def _gather(pieces: Sequence[Piece], total: int) -> Signatures:
    """All signatures as one file: the system keeps of it in memory what fits."""
    path = pieces[0].folder / "near.all"
    whole = np.memmap(path, np.uint32, "w+", shape=(total, 2, SLOTS))
    start = 0
    for piece in pieces:
        own = np.load(piece.path("near.npy"), mmap_mode="r")
        whole[start : start + len(own)] = own
        start += len(own)
    return whole


def _decide_near(signatures: Signatures, decisions: Decisions, threshold: float) -> None:
    rank = np.where(decisions.is_held_out, 0, len(signatures)) + np.arange(len(signatures))  # held-out rows come first
    live = np.flatnonzero(decisions.reason == KEPT)
    for own, other in candidates(signatures, REST, rank, threshold=threshold, among=live):
        is_near = are_alike(signatures, REST, own, other, threshold=threshold)
        own, other = own[is_near], other[is_near]
        decisions.reject(own[are_alike(signatures, PROMPT, own, other, threshold=threshold)], NEAR_DUPLICATE)
    live = np.flatnonzero(decisions.reason == KEPT)
    for own, other in candidates(signatures, PROMPT, rank, threshold=threshold, among=live):
        crosses = ~decisions.is_held_out[own] & decisions.is_held_out[other]
        own, other = own[crosses], other[crosses]
        decisions.reject(own[are_alike(signatures, PROMPT, own, other, threshold=threshold)], NEAR_LEAKAGE)


def _draw(
    files: Sequence[NDArray[np.void]],
    sources: NDArray[np.int32],
    decisions: Decisions,
    weights: Sequence[float],
) -> None:
    """Of each source's kept rows as many as its weight allows, so that the scarcest is used whole; those with the
    smallest content keys, which is as good as by lot, and the same each time."""
    keys = np.concatenate([np.asarray(file["content"]) for file in files])
    live = [np.flatnonzero((sources == number) & (decisions.reason == KEPT)) for number in range(len(weights))]
    unit = min(len(rows) / weight for rows, weight in zip(live, weights, strict=True))
    for rows, weight in zip(live, weights, strict=True):
        order = np.lexsort((rows, keys[rows]))
        decisions.reject(rows[order[round(unit * weight) :]], NOT_DRAWN)
