"""Near duplicates: MinHash signatures (Broder 1997) of word shingles, and rows whose signatures say they are alike.

The signatures are rensa's R-MinHash. Two texts of Jaccard similarity s fall into a common bucket with probability
1 − (1 − s^r)^b, b bands of r rows (Leskovec et al., Mining of Massive Datasets, 3.4); whatever shares one is held
against the threshold by the share of equal signature slots, whose standard error is √(s(1−s)/128).
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from rensa import RMinHash  # pyright: ignore[reportAttributeAccessIssue] a compiled module without stubs
from xxhash import xxh3_64_intdigest

from data.records import Comparison, Demonstration, Record, Verdict
from data.splits import normalize, normalized_prompt

SLOTS = 128
SHINGLE = 5  # words
PROMPT, REST = 0, 1
Signatures = NDArray[np.uint32]  # (rows, 2, SLOTS): of the prompt, and of what stands beside it
Rows = NDArray[np.int64]
_SEED = 42
_BLOCK = 1 << 14  # pairs compared at a time
_WEIGHTS = np.array(
    [pow(0x9E3779B97F4A7C15, k, 2**64) for k in range(1, SHINGLE + 1)], np.uint64
)  # odd: no bit is lost
_BAND_WEIGHTS = np.array([pow(0xD6E8FEB86659FD93, k, 2**64) for k in range(1, 17)], np.uint64)


def signatures(records: Sequence[Record]) -> Signatures:
    """Of each record's prompt, and of its responses. A text, a prompt or the rest of a demonstration stands for both
    if there is nothing else."""
    texts = [normalized_prompt(record) for record in records]
    texts += [_rest(record) or prompt for record, prompt in zip(records, texts, strict=True)]
    hashes, offsets = shingle_hashes(texts)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(hashes, offsets, num_perm=SLOTS, seed=_SEED)
    found = np.array(matrix.to_rows(), np.uint32).reshape(2, len(records), SLOTS)
    return np.ascontiguousarray(found.transpose(1, 0, 2))


def shingle_hashes(texts: Sequence[str]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """(hashes, offsets): the shingles of text n are hashes[offsets[n]:offsets[n + 1]]; a short text is one."""
    words: list[int] = []
    counts: list[int] = []
    for text in texts:
        own = [_hash_of(word) for word in text.split()]
        own += [0] * (SHINGLE - len(own))
        words += own
        counts.append(len(own))
    ends = np.cumsum(counts, dtype=np.int64)
    flat = np.array(words, np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(flat, SHINGLE) if counts else np.zeros((0, SHINGLE), np.uint64)
    is_inside = np.ones(len(windows), bool)
    for back in range(1, SHINGLE):  # those that would reach into the next text
        is_inside[(ends - back)[ends - back < len(windows)]] = False
    hashes = (windows[is_inside] * _WEIGHTS).sum(1, dtype=np.uint64)
    offsets = np.concatenate([[0], np.cumsum(np.array(counts, np.int64) - SHINGLE + 1)]).astype(np.uint64)
    return hashes, offsets


def candidates(
    signatures: Signatures, which: int, rank: Rows, *, threshold: float, among: Rows
) -> Iterator[tuple[Rows, Rows]]:
    """Band by band, pairs (row, other) of those `among`: the other is the first of the row's bucket by `rank`, or the
    one before it."""
    rows = rows_per_band(threshold)
    for start in range(0, SLOTS, rows):
        band = signatures[among, which, start : start + rows]
        buckets = (band * _BAND_WEIGHTS[:rows]).sum(1, dtype=np.uint64)
        order = np.lexsort((rank[among], buckets))
        is_new = np.diff(buckets[order], prepend=buckets[order][:1] + np.uint64(1)) != 0
        first = np.maximum.accumulate(np.where(is_new, np.arange(len(order)), 0))
        later = np.flatnonzero(~is_new)
        yield among[order[later]], among[order[first[later]]]
        yield among[order[later]], among[order[later - 1]]


def are_alike(signatures: Signatures, which: int, one: Rows, other: Rows, *, threshold: float) -> NDArray[np.bool_]:
    """Whether the estimated Jaccard similarity of the rows, pair by pair, reaches the threshold."""
    blocks = range(0, len(one), _BLOCK)
    equal = [
        (signatures[one[at : at + _BLOCK], which] == signatures[other[at : at + _BLOCK], which]).mean(1)
        for at in blocks
    ]
    return np.concatenate([np.zeros(0), *equal]) >= threshold


def rows_per_band(threshold: float) -> int:
    """The most that still bring 99 % of the pairs at the threshold into a common bucket."""
    fitting = [rows for rows in (1, 2, 4, 8, 16) if 1 - (1 - threshold**rows) ** (SLOTS // rows) >= 0.99]
    return max(fitting, default=1)


@lru_cache(maxsize=1 << 17)
def _hash_of(word: str) -> int:
    return xxh3_64_intdigest(word.encode())


def _marked(text: str) -> str:
    """Of words that are like no unmarked ones."""
    return " ".join(f"\x01{word}" for word in normalize(text).split())


def _rest(record: Record) -> str:
    match record:
        case Comparison():
            sides = (record.chosen, record.rejected)
            better, worse = sides if record.preference >= 0.5 else sides[::-1]
            return f"{normalize(better)} {_marked(worse)}"  # no likeness of A > B with B > A
        case Verdict():
            return normalize(record.response) if record.is_good else _marked(record.response)
        case Demonstration():
            return " ".join(normalize(message.content) for message in record.messages)
        case _:
            return ""
