"""Decisions on whole sets: worked by hand, and against a plain loop."""

import random
from pathlib import Path

import numpy as np
import pytest

from data.ingestion.decide import KEPT, decide
from data.ingestion.rules import ACROSS_ROWS, SetRules, SourceFile
from data.ingestion.shapes import SHAPES
from data.ingestion.sift import KEYS, Piece, Sifted
from data.readers import Chunk

Key = tuple[int, int, int, int]  # content, prompt, pair, side


def sifted_of(folder: Path, *files: list[Key], held_out: int | None = None) -> list[Sifted]:
    """One piece a file, each a source of its own; `held_out` is the number of the one that is held out."""
    shape = SHAPES["hh-rlhf"]
    sifted: list[Sifted] = []
    for number, keys in enumerate(files):
        source = SourceFile(f"{number}.jsonl", number, shape, is_held_out=number == held_out)
        piece = Piece(number, source, Chunk(folder / source.name, 0, 1), folder)
        np.array(keys, KEYS).tofile(piece.path("keys"))
        sifted.append(Sifted(piece, 0, len(keys), len(keys), ()))
    return sifted


def reasons(sifted: list[Sifted], rules: SetRules, rows_in_memory: int = 1000) -> list[str | None]:
    decided = decide(sifted, rules, rows_in_memory=rows_in_memory)
    return [None if reason == KEPT else ACROSS_ROWS[reason] for reason in decided.reason]


NOTHING_HELD_OUT = SetRules(held_out_fraction=0.0)


def test_of_equal_rows_the_first_is_kept(tmp_path: Path) -> None:
    sifted = sifted_of(tmp_path, [(1, 9, 5, 1), (2, 9, 6, 1), (1, 9, 5, 1)], [(2, 9, 6, 1), (3, 8, 7, 1)])
    assert reasons(sifted, NOTHING_HELD_OUT) == [None, None, "exact duplicate", "exact duplicate", None]


def test_a_pair_that_is_preferred_both_ways_is_rejected_on_both_sides(tmp_path: Path) -> None:
    keys = [
        (1, 9, 5, 1),
        (2, 9, 5, -1),
        (3, 9, 6, 1),
        (4, 9, 7, 1),
        (5, 9, 7, 0),
    ]
    assert reasons(sifted_of(tmp_path, keys), NOTHING_HELD_OUT) == ["contradictory"] * 2 + [None] * 3


def test_a_row_whose_prompt_is_held_out_is_not_trained_on(tmp_path: Path) -> None:
    sifted = sifted_of(tmp_path, [(1, 9, 1, 1), (2, 8, 2, 1)], [(3, 9, 3, 1), (2, 8, 2, 1)], held_out=1)
    # Row 1 stands in the held-out file, too: the held-out one is the one that stays
    assert reasons(sifted, SetRules(0.5)) == ["prompt is held out", "exact duplicate", None, None]
    assert decide(sifted, SetRules(0.5)).is_held_out.tolist() == [False, False, True, True]


def test_a_fraction_is_held_out_by_prompt(tmp_path: Path) -> None:
    draw = random.Random(0)
    prompts = [draw.randrange(2**64) for _ in range(500)]
    keys = [(n, prompt, n, 1) for n, prompt in enumerate(prompts * 2)]
    is_held_out = decide(sifted_of(tmp_path, keys), SetRules(0.2)).is_held_out
    assert (is_held_out[:500] == is_held_out[500:]).all()
    assert is_held_out.mean() == pytest.approx(0.2, abs=0.05)


def test_weights_keep_all_of_the_scarcest_source_and_a_share_of_the_others(tmp_path: Path) -> None:
    draw = random.Random(1)
    files = [[(draw.randrange(2**64), n, n * 100 + k, 1) for n in range(size)] for k, size in enumerate((100, 40))]
    found = reasons(sifted_of(tmp_path, *files), SetRules(0.0, weights=(0.5, 0.5)))
    assert found[100:] == [None] * 40
    assert found[:100].count(None) == 40
    assert set(found) == {None, "not drawn by weight"}


@pytest.mark.parametrize("rows_in_memory", [1, 7, 50, 1000])
def test_in_parts_or_at_once_the_decisions_are_those_of_a_plain_loop(tmp_path: Path, rows_in_memory: int) -> None:
    draw = random.Random(2)
    keys = [(draw.randrange(30), 0, draw.randrange(20), draw.choice((-1, 0, 1))) for _ in range(120)]
    keys = [(content, content % 5 + 2**63, content % 5 + 10 * pair, side) for content, _, pair, side in keys]
    seen: set[int] = set()
    expected: list[str | None] = []
    for content, *_ in keys:
        expected.append("exact duplicate" if content in seen else None)
        seen.add(content)
    sides: dict[int, set[int]] = {}
    for (_, _, pair, side), reason in zip(keys, expected, strict=True):
        if reason is None:
            sides.setdefault(pair, set()).add(side)
    for n, (_, _, pair, side) in enumerate(keys):
        if expected[n] is None and side and {1, -1} <= sides[pair]:
            expected[n] = "contradictory"
    sifted = sifted_of(tmp_path, keys[:50], keys[50:])
    assert reasons(sifted, NOTHING_HELD_OUT, rows_in_memory) == expected


def test_a_tie_beside_a_contradiction_contradicts_nobody(tmp_path: Path) -> None:
    keys = [(1, 9, 5, 1), (2, 9, 5, -1), (3, 9, 5, 0)]
    assert reasons(sifted_of(tmp_path, keys), NOTHING_HELD_OUT) == ["contradictory", "contradictory", None]


def test_a_share_that_is_no_whole_number_of_rows_is_rounded(tmp_path: Path) -> None:
    files = [[(n + 100 * k, n, n + 100 * k, 1) for n in range(size)] for k, size in enumerate((10, 5))]
    found = reasons(sifted_of(tmp_path, *files), SetRules(0.0, weights=(1.0, 3.0)))
    assert (found[:10].count(None), found[10:].count(None)) == (2, 5)  # 5/3 and 5
