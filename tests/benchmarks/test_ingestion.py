"""The generator of the ingestion benchmark, what measures its processes, and how its bars are judged."""

import hashlib
import json
import os
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import cast

import pytest

from tests.benchmarks import hh_shaped
from tests.benchmarks.hh_shaped import Planted
from tests.benchmarks.ingestion import Account, Timing, account_bars, memory_bars, speed_bars
from tests.benchmarks.process_tree import measure

PAIRS = 4000
Pair = tuple[str, str]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def parsed(path: Path) -> tuple[list[Pair], int]:
    """The pairs, and the number of malformed lines."""
    pairs: list[Pair] = []
    malformed = 0
    for line in path.read_bytes().splitlines():
        try:
            row: object = json.loads(line.decode())
        except ValueError:
            row = None
        if isinstance(row, dict):
            row = cast(dict[str, str], row)
            pairs.append((row["chosen"], row["rejected"]))
        else:
            malformed += 1
    return pairs, malformed


def halves(pair: Pair) -> tuple[str, str, str]:
    """The prompt, and the two answers, split where the last answer begins."""
    prompt, answer = pair[0].rsplit("\n\nAssistant:", 1)
    return prompt, answer, pair[1].removeprefix(prompt + "\n\nAssistant:")


def shingles(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}


def similarity(first: str, second: str) -> float:
    return len(shingles(first) & shingles(second)) / len(shingles(first) | shingles(second))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Planted]:
    path = tmp_path_factory.mktemp("hh") / "pairs.jsonl"
    return path, hh_shaped.write(path, PAIRS, seed=3)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(file: tuple[Path, Planted], tmp_path: Path) -> None:
    assert hh_shaped.write(tmp_path / "again.jsonl", PAIRS, seed=3) == file[1]
    assert digest(tmp_path / "again.jsonl") == digest(file[0])
    hh_shaped.write(tmp_path / "other.jsonl", PAIRS, seed=4)
    assert digest(tmp_path / "other.jsonl") != digest(file[0])


def test_the_bytes_of_seed_0_are_those_that_were_measured(tmp_path: Path) -> None:
    hh_shaped.write(tmp_path / "pairs.jsonl", 1000)
    assert digest(tmp_path / "pairs.jsonl")[:16] == "5261677de9350da2"


def test_a_row_has_the_bytes_that_make_151_mb_of_104040(tmp_path: Path) -> None:
    hh_shaped.write(tmp_path / "pairs.jsonl", 20_000)
    size = (tmp_path / "pairs.jsonl").stat().st_size * hh_shaped.PAIRS / 20_000
    assert size == pytest.approx(hh_shaped.BYTES, rel=0.02)  # the mean of a fifth of the rows is less certain


def test_transcripts_have_one_to_five_exchanges_and_sides_that_share_all_but_the_last_answer(
    file: tuple[Path, Planted],
) -> None:
    pairs, _ = parsed(file[0])
    exchanges = Counter(chosen.count("\n\nHuman: ") for chosen, _ in pairs)
    assert set(exchanges) == {1, 2, 3, 4, 5}
    assert exchanges[1] > exchanges[3] > exchanges[5] > 0
    for pair in pairs:
        prompt, _, rejected = halves(pair)
        assert prompt.startswith("\n\nHuman: ")
        assert pair[1] == f"{prompt}\n\nAssistant:{rejected}"


def test_the_defects_in_the_file_are_those_that_were_planted(file: tuple[Path, Planted]) -> None:
    path, planted = file
    pairs, malformed = parsed(path)
    assert len(path.read_bytes().splitlines()) == planted.pairs == PAIRS
    assert malformed == planted.malformed_lines == 2
    assert sum(chosen == rejected for chosen, rejected in pairs) == planted.identical_pairs == 20
    assert sum(not all(map(str.strip, halves(pair)[1:])) for pair in pairs) == planted.empty_responses == 8
    assert sum(count - 1 for count in Counter(pairs).values()) == planted.exact_duplicates == 40
    exchanged = {(rejected, chosen) for chosen, rejected in pairs if chosen != rejected}
    assert sum(pair in exchanged for pair in pairs) == 2 * planted.contradictory_pairs == 20
    assert sum(planted.rejected.values()) == 2 + 20 + 8 + 40 + 20


def test_near_duplicates_are_near_by_each_part_of_a_row_and_other_rows_are_far(file: tuple[Path, Planted]) -> None:
    pairs, _ = parsed(file[0])
    rows = [halves(pair) for pair in dict.fromkeys(pairs)]
    by_beginning: dict[str, list[tuple[str, str, str]]] = {}
    for row in rows:  # the first words of one of the three parts are the same, unless each has been changed there
        for part in row:
            if len(part.split()) >= hh_shaped.LONG:
                by_beginning.setdefault(" ".join(part.split()[:8]), []).append(row)
    near = {(same[0], same[1]) for same in by_beginning.values() if len(same) == 2 and same[0][0] != same[1][0]}
    assert len(near) == file[1].near_duplicates == 40
    for doubles in near:
        for first, second in zip(*doubles, strict=True):
            assert 0.9 < similarity(first, second) < 1
    doubled = {row for doubles in near for row in doubles}
    prompts = Counter(prompt for prompt, _, _ in rows)
    clean = [" ".join(row) for row in rows if row not in doubled and prompts[row[0]] == 1]
    assert len(clean) > 0.9 * PAIRS
    assert max(similarity(first, second) for first, second in pairwise(sorted(clean))) < 0.2


def test_without_malformed_lines_all_others_stay(file: tuple[Path, Planted], tmp_path: Path) -> None:
    planted = hh_shaped.write(tmp_path / "parsable.jsonl", PAIRS, seed=3, malformed=False)
    assert parsed(tmp_path / "parsable.jsonl") == (parsed(file[0])[0], 0)
    assert (planted.pairs, planted.malformed_lines) == (PAIRS - 2, 0)
    assert planted.near_duplicates == file[1].near_duplicates


def test_memory_is_that_of_the_process_and_of_its_children_together(tmp_path: Path) -> None:
    hold = "import time; held = bytearray(60_000_000); time.sleep(0.5)"
    code = f"import subprocess, sys; c = subprocess.Popen([sys.executable, '-c', {hold!r}]); {hold}; c.wait(); print(1)"
    measured = measure([sys.executable, "-c", code], tmp_path, environment=os.environ)
    assert 120_000_000 < measured.peak_rss_bytes < 200_000_000
    assert measured.seconds > 0.5
    assert measured.stdout == "1\n"


def test_a_command_that_fails_says_what_it_said(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="exit code 3\nno such thing"):
        measure([sys.executable, "-c", "import sys; print('no such thing', file=sys.stderr); sys.exit(3)"], tmp_path,
                environment=os.environ)  # fmt: skip


def timing(seconds: float, megabytes: float = 400) -> Timing:
    return Timing("", PAIRS, seconds, round(megabytes * 1e6), [seconds])


@pytest.mark.parametrize(
    ("seconds", "held"),
    [((12, 6, 18), (True, True)), ((12, 6.1, 18), (False, True)), ((12, 2, 14.1), (True, False))],
    ids=["both at their bars", "exact too slow", "near adds too much"],
)
def test_speed_is_held_against_trl_in_the_same_run(
    seconds: tuple[float, float, float], held: tuple[bool, bool]
) -> None:
    trl, exact, near = map(timing, seconds)
    timings = {"trl": trl, "exact": exact, "near": near}
    assert tuple(bar.is_held for bar in speed_bars(timings)) == held


def test_memory_is_held_against_one_size_whatever_the_file() -> None:
    bars = memory_bars({"exact": timing(1, megabytes=500), "exact-ten-times": timing(1, megabytes=501)})
    assert [bar.is_held for bar in bars] == [True, False]


def account(planted: Planted, near: int = 0, **changed: int) -> Account:
    rejected = planted.rejected | {name.replace("_", " "): count for name, count in changed.items()}
    rejected |= {"near duplicate": near} if near else {}
    return {"rows_in": planted.pairs, "kept": planted.pairs - sum(rejected.values()), "rejected": rejected}


def test_all_defects_found_and_no_row_lost_is_held() -> None:
    planted = Planted.among(PAIRS)
    for near in (38, 40):  # of 40
        accounts = {"exact": account(planted), "near": account(planted, near)}
        assert all(bar.is_held for bar in account_bars(planted, accounts))


@pytest.mark.parametrize(
    ("exact", "near"),
    [
        ({"malformed": 1}, {"near": 40}),
        ({"wrong_type": 1}, {"near": 40}),
        ({"near": 1}, {"near": 40}),
        ({}, {"near": 37}),
        ({}, {"near": 41}),
        ({}, {"near": 40, "exact_duplicate": 39}),
    ],
    ids=["one missed", "a clean row", "near unasked", "near missed", "near, too many", "exact missed when near"],
)
def test_one_row_too_many_or_too_few_is_a_missed_bar(exact: dict[str, int], near: dict[str, int]) -> None:
    planted = Planted.among(PAIRS)
    accounts = {"exact": account(planted, **exact), "near": account(planted, **near)}
    assert [bar.is_held for bar in account_bars(planted, accounts)].count(False) == 1


def test_a_row_in_no_column_of_the_account_is_a_missed_bar() -> None:
    planted = Planted.among(PAIRS)
    short = account(planted)
    short["kept"] -= 1
    assert not all(bar.is_held for bar in account_bars(planted, {"exact": short, "near": account(planted, 40)}))
