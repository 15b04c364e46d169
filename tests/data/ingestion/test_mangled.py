"""Whatever a file holds, it becomes a data set whose rows add up, or one message; never a traceback."""

import gzip
import io
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data.ingestion.mangled import BOM, BROKEN_LINES, MangledFile, good_row, mangled_files
from tests.data.ingestion.outcome import check, ingest_files, kept_rows, rejects

GOOD = [json.dumps(good_row(number)).encode() for number in range(20)]
FUZZ = settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


@pytest.fixture(scope="module", autouse=True)
def one_core() -> Iterator[None]:
    """Else several files mean several processes, whose start takes longer than all the rest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "cpu_count", lambda: 1)
        yield


@FUZZ
@given(st.lists(mangled_files(), min_size=1, max_size=2), st.booleans())
def test_a_mangled_file_is_accounted_for_or_refused(files: list[MangledFile], is_near_wanted: bool) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        paths = [file.write(folder, f"mangled-{number}") for number, file in enumerate(files)]
        check(ingest_files(paths, folder / "made", *(["--near", "0.8"] if is_near_wanted else [])))


def parquet(name: str, *texts: bytes) -> bytes:
    """A column of strings that Arrow takes on trust."""
    file = io.BytesIO()
    pq.write_table(pa.table({name: pa.array(texts, pa.binary()).view(pa.string())}), file)
    return file.getvalue()


@pytest.mark.parametrize(
    "file",
    [
        MangledFile(".json", b"[" + GOOD[0] + b', {"\\ud800": null}, {"prompt": "\\udfff"}]'),
        MangledFile(".csv", b"prompt,chosen,rejected\nA?,B,C\n\xff\xfe,\xff\nD?,\xff,E\n"),
        MangledFile(".csv", b"\n\xff\xfe,\xff"),
        MangledFile(".parquet", parquet("prompt", b"A?", b"\xc2?", b"B?")),
        MangledFile(".parquet", parquet("prompt", b"A?").replace(b"prompt", b"\xf0rompt")),
        MangledFile(".jsonl", b"\n".join(GOOD).decode().encode("utf-16")),
    ],
    ids=["surrogates", "a csv in latin 1", "no header", "parquet's texts", "parquet's columns", "utf-16"],
)
def test_what_is_no_utf8_is_accounted_for_or_refused(file: MangledFile, tmp_path: Path) -> None:
    for options in ([], ["--format", "trl-prompt"]):
        check(ingest_files([file.write(tmp_path)], tmp_path / f"made-{len(options)}", *options))


@FUZZ
@given(mangled_files(), st.sampled_from(("trl-preference", "hh-rlhf", "trl-messages", "ultrafeedback", "thumbs")))
def test_nor_does_a_format_that_the_file_has_not_do_any_harm(file: MangledFile, shape: str) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        check(ingest_files([file.write(folder)], folder / "made", "--format", shape))


@FUZZ
@given(st.lists(st.sampled_from(BROKEN_LINES), max_size=8), st.data())
def test_the_good_rows_around_broken_lines_are_kept_and_each_broken_line_is_counted(
    broken: list[bytes], data: st.DataObject
) -> None:
    lines = data.draw(st.permutations(GOOD + broken))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        file = MangledFile(".jsonl", data.draw(st.sampled_from((b"\n", b"\r\n"))).join(lines))
        outcome = ingest_files([file.write(folder)], folder / "made")
        check(outcome)
        assert outcome.account is not None
        assert (outcome.account["kept"], outcome.account["rejected"].get("malformed", 0)) == (len(GOOD), len(broken))
        where = [number for number, line in enumerate(lines, start=1) if line in BROKEN_LINES]
        assert [reject["line"] for reject in rejects(folder / "made")] == where


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet", ".zst"])
def test_an_empty_file_is_refused(tmp_path: Path, ending: str) -> None:
    outcome = ingest_files([MangledFile(ending, b"").write(tmp_path)], tmp_path / "made")
    check(outcome)
    assert outcome.result.exit_code == 2


def test_an_empty_file_beside_a_good_one_does_no_harm(tmp_path: Path) -> None:
    paths = [MangledFile(".jsonl", content).write(tmp_path, name) for name, content in (("a", b""), ("b", GOOD[0]))]
    outcome = ingest_files(paths, tmp_path / "made")
    check(outcome)
    assert outcome.result.exit_code == 0


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".jsonl.gz"])
def test_a_line_of_5_mb_is_a_row_like_any_other(tmp_path: Path, ending: str) -> None:
    long = json.dumps({"prompt": "How long?", "chosen": "long " * 1_000_000, "rejected": "short"}).encode()
    broken = b'{"prompt": "' + b"x" * 5_000_000
    content = b"\n".join([*GOOD, long, broken, GOOD[0]])
    file = MangledFile(ending, gzip.compress(content) if ending.endswith(".gz") else content)
    outcome = ingest_files([file.write(tmp_path)], tmp_path / "made")
    check(outcome)
    assert outcome.account is not None
    assert outcome.account["kept"] == len(GOOD) + 1
    assert outcome.account["rejected"] == {"exact duplicate": 1, "malformed": 1}
    assert max(len(str(row["chosen"])) for row in kept_rows(tmp_path / "made")) >= 4_999_999


def test_the_rows_before_a_cut_in_a_gzip_are_kept(tmp_path: Path) -> None:
    lines = b"\n".join(json.dumps(good_row(n * 7919 % 100_003)).encode() for n in range(20_000))
    content = gzip.compress(lines)
    outcome = ingest_files([MangledFile(".jsonl.gz", content[: len(content) // 2]).write(tmp_path)], tmp_path / "made")
    check(outcome)
    assert outcome.account is not None
    assert 5_000 < outcome.account["kept"] < 15_000
    assert outcome.account["rejected"] == {"malformed": 1}


def test_fields_of_a_csv_hold_line_breaks_and_a_ragged_row_is_no_row(tmp_path: Path) -> None:
    content = BOM + b'prompt,chosen,rejected\r\n"A?\nReally?",B,C\r\nA?,B\r\nA?,B,C,D\r\n"D?","E\r\nF",G\r\n'
    outcome = ingest_files([MangledFile(".csv", content).write(tmp_path)], tmp_path / "made")
    check(outcome)
    assert outcome.account is not None
    assert (outcome.account["kept"], outcome.account["rejected"]) == (2, {"malformed": 2})
