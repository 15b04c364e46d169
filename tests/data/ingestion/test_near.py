"""MinHash against the Jaccard similarity that it estimates."""

import random

import numpy as np
import pytest

from data.ingestion.near import REST, SHINGLE, SLOTS, are_alike, candidates, rows_per_band, shingle_hashes, signatures
from data.records import Comparison, Message

WORDS = [f"word{n}" for n in range(2000)]


def pair(chosen: str, prompt: str = "a prompt of five words and more") -> Comparison:
    return Comparison((Message("user", prompt),), chosen, chosen[::-1], "f.jsonl:1")


def shingles(text: str) -> set[str]:
    words = text.split()
    return {" ".join(words[i : i + SHINGLE]) for i in range(len(words) - SHINGLE + 1)}


def text(draw: random.Random, words: int = 200) -> str:
    return " ".join(draw.choices(WORDS, k=words))


def test_shingles_are_those_of_a_plain_loop_and_never_reach_into_the_next_text() -> None:
    draw = random.Random(0)
    texts = [text(draw, count) for count in (1, 4, 5, 6, 40)] + ["", text(draw, 9)]
    hashes, offsets = shingle_hashes(texts)
    counts = [max(1, len(t.split()) - SHINGLE + 1) for t in texts]
    assert np.diff(offsets.astype(np.int64)).tolist() == counts
    by_text: dict[str, int] = {}
    for own, start in zip(texts, offsets[:-1].astype(int), strict=True):
        words = own.split()
        for n in range(max(0, len(words) - SHINGLE + 1)):
            shingle = " ".join(words[n : n + SHINGLE])
            assert by_text.setdefault(shingle, int(hashes[start + n])) == hashes[start + n]
    assert len(set(by_text.values())) == len(by_text)
    assert len(shingle_hashes([])[0]) == 0


@pytest.mark.parametrize("changed", [2, 8, 20])
def test_the_share_of_equal_slots_is_the_jaccard_similarity(changed: int) -> None:
    draw = random.Random(changed)
    found, expected = [], []
    for _ in range(40):
        words = text(draw).split()
        other = list(words)
        for place in draw.sample(range(len(words)), changed):
            other[place] = draw.choice(WORDS)
        one, two = " ".join(words), " ".join(other)
        rows = signatures([Comparison((Message("user", "x"),), own, "", "f.jsonl:1") for own in (one, two)])
        found.append((rows[0, REST] == rows[1, REST]).mean())
        expected.append(len(shingles(one) & shingles(two)) / len(shingles(one) | shingles(two)))
    # Standard error of one is at most 1/(2√128) = 0.044, of the mean of 40 it is 0.007
    assert np.mean(found) == pytest.approx(np.mean(expected), abs=0.03)


def test_signatures_do_not_depend_on_which_rows_come_together() -> None:
    draw = random.Random(1)
    records = [pair(text(draw), text(draw, 30)) for _ in range(6)]
    together = signatures(records)
    apart = np.concatenate([signatures([record]) for record in records])
    assert (together == apart).all()
    assert together.shape == (6, 2, SLOTS)


def test_what_is_alike_shares_a_bucket_and_is_compared_with_what_came_before() -> None:
    draw = random.Random(2)
    texts = [text(draw) for _ in range(50)]
    near = [" ".join([*own.split()[:-2], "changed", "end"]) for own in texts[:10]]
    rows = signatures([pair(own) for own in texts + near])
    rank = np.arange(len(rows))
    found: set[tuple[int, int]] = set()
    for one, other in candidates(rows, REST, rank, threshold=0.8, among=rank):
        alike = are_alike(rows, REST, one, other, threshold=0.8)
        assert (other < one).all()
        found |= set(zip(one[alike].tolist(), other[alike].tolist(), strict=True))
    assert found == {(50 + n, n) for n in range(10)}


@pytest.mark.parametrize(("threshold", "rows"), [(0.5, 2), (0.8, 4), (0.95, 16)])
def test_bands_bring_99_of_100_pairs_at_the_threshold_together(threshold: float, rows: int) -> None:
    assert rows_per_band(threshold) == rows
    assert 1 - (1 - threshold**rows) ** (SLOTS // rows) >= 0.99


def test_a_row_is_held_against_the_first_of_its_bucket_and_the_one_before_it() -> None:
    same = np.zeros((3, 2, SLOTS), np.uint32)
    found = candidates(same, REST, np.arange(3), threshold=0.8, among=np.arange(3))
    assert {pair for own, other in found for pair in zip(own.tolist(), other.tolist(), strict=True)} == {
        (1, 0), (2, 0), (2, 1),
    }  # fmt: skip
