import gzip
import json
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import data.sources
from align.config import SourceConfig
from align.errors import DataError
from data.records import Account, Prompt, Reject
from data.sources import iterate_rows, peek, read_records, resolve_path
from tests.data.ingestion.datasets import pair, write_dataset

ROWS = [{"prompt": f"Question {n}?"} for n in range(1, 6)]


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def source(path: Path, limit: int | None = None) -> SourceConfig:
    return SourceConfig.model_validate({"path": path, "limit": limit})


def hub(name: str, **settings: str | int) -> SourceConfig:
    return SourceConfig.model_validate({"hub": name, **settings})


def test_a_malformed_line_is_a_reject_with_file_and_line_and_its_neighbours_are_kept(tmp_path: Path) -> None:
    bad = [b"{", b"[1]", b"\xff{}", b'{"prompt": "\x00"}', b"\x00", b"[" * 100_000, b'{"n": ' + b"1" * 5000 + b"}"]
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b"\n".join([b'{"prompt": "first"}', *bad, b'{"prompt": "last"}']))
    rows = list(iterate_rows(path, limit=None))
    assert [label for label, _ in rows] == [f"bad.jsonl:{n}" for n in range(1, len(bad) + 3)]
    assert rows[0][1] == {"prompt": "first"}
    assert rows[-1][1] == {"prompt": "last"}
    for label, row in rows[1:-1]:
        assert isinstance(row, Reject)
        assert (row.source, row.reason) == (label, "malformed")
        assert 0 < len(row.detail) <= 80


def test_blank_lines_are_no_rows_but_count_as_lines_and_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "blank.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n   \n{"a": 2}')
    assert list(iterate_rows(path, limit=None)) == [("blank.jsonl:1", {"a": 1}), ("blank.jsonl:4", {"a": 2})]


def test_the_limit_counts_rows_not_lines(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    path.write_text('\n{"a": 1}\n\n{"a": 2}\n{"a": 3}\n')
    assert [row for _, row in iterate_rows(path, limit=2)] == [{"a": 1}, {"a": 2}]


def test_gzip_and_parquet_hold_the_same_records_as_jsonl(tmp_path: Path) -> None:
    plain = write_jsonl(tmp_path / "f.jsonl", ROWS)
    zipped, parquet = tmp_path / "f.jsonl.gz", tmp_path / "f.parquet"
    zipped.write_bytes(gzip.compress(plain.read_bytes()))
    pq.write_table(pa.Table.from_pylist(ROWS), parquet)
    readings = [read_records(source(path), "prompt") for path in (plain, zipped, parquet)]
    messages = [[record.messages for record in reading.records] for reading in readings]
    assert messages[0] == messages[1] == messages[2]
    assert [reading.records[1].source for reading in readings] == ["f.jsonl:2", "f.jsonl.gz:2", "f.parquet:row 2"]


def test_parquet_reads_nested_messages_and_more_than_one_batch(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": f"Question {n}?"}]} for n in range(2500)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "f.parquet")
    reading = read_records(source(tmp_path / "f.parquet"), "prompt")
    assert reading.account == Account(2500, 2500, ())
    assert reading.records[-1].source == "f.parquet:row 2500"


def test_a_truncated_gzip_names_the_file_and_the_line(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl.gz"
    lines = "".join(json.dumps({"prompt": f"{n * 7919 % 100_003}"}) + "\n" for n in range(20_000))
    content = gzip.compress(lines.encode())
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"f\.jsonl\.gz:[1-9]\d+: the file is damaged or cut short"):
        read_records(source(path), "prompt")
    path.write_bytes(b"no gzip at all")
    with pytest.raises(DataError, match=r"f\.jsonl\.gz:1: the file is damaged"):
        read_records(source(path), "prompt")


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "f.parquet"
    path.write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"f\.parquet is no Parquet file, or is damaged"):
        read_records(source(path), "prompt")


def test_missing_files_folders_and_unknown_kinds_of_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl: it does not exist"):
        read_records(source(tmp_path / "none.jsonl"), "prompt")
    with pytest.raises(DataError, match="it is a folder, and no data set of align ingest"):
        read_records(source(tmp_path), "prompt")
    text = tmp_path / "f.txt"
    text.write_text("prompt")
    with pytest.raises(DataError, match=r"f\.txt: unknown kind.*\.jsonl, .*\.parquet"):
        read_records(source(text), "prompt")


@pytest.mark.parametrize("content", ["", "\n\n  \n"])
def test_a_file_without_rows_is_an_error(tmp_path: Path, content: str) -> None:
    path = tmp_path / "f.jsonl"
    path.write_text(content)
    for read in (read_records, peek):
        with pytest.raises(DataError, match=r"f\.jsonl is empty"):
            read(source(path), "prompt")


def test_samples_resolve_into_the_package_and_a_missing_one_lists_those_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "README.md").touch()
    sample = write_jsonl(tmp_path / "deep" / "f.jsonl", ROWS)
    monkeypatch.setattr(data.sources, "_SAMPLES", tmp_path)
    assert resolve_path(Path("samples:deep/f.jsonl")) == sample
    assert len(read_records(source(Path("samples:deep/f.jsonl")), "prompt").records) == 5
    with pytest.raises(DataError, match=r"no sample samples:none\.jsonl; the samples are: samples:deep/f\.jsonl$"):
        resolve_path(Path("samples:none.jsonl"))


def test_the_account_of_a_reading_adds_up(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    path.write_text('{"prompt": "a"}\nnot json\n{"prompt": ""}\n{"prompt": ""}\n')
    reading = read_records(source(path), "prompt")
    assert reading.account == Account(4, 1, (("empty prompt", 2), ("malformed", 1)))
    assert [reject.source for reject in reading.rejects] == ["f.jsonl:2", "f.jsonl:3", "f.jsonl:4"]
    assert isinstance(reading.records[0], Prompt)


def test_the_content_hash_follows_the_bytes_and_the_limit_and_not_the_place(tmp_path: Path) -> None:
    first, second = write_jsonl(tmp_path / "a.jsonl", ROWS), write_jsonl(tmp_path / "b.jsonl", ROWS)
    changed = write_jsonl(tmp_path / "c.jsonl", [*ROWS[:-1], {"prompt": "Other?"}])
    whole = read_records(source(first), "prompt").content_hash
    assert len(whole) == 64
    assert read_records(source(second), "prompt").content_hash == whole
    assert read_records(source(changed), "prompt").content_hash != whole
    assert read_records(source(first, limit=3), "prompt").content_hash != whole


def test_rows_of_another_format_are_refused_with_the_keys_found_and_the_formats_known(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "f.jsonl", [{"question": "Why?", "answer": "Because."}] * 30)
    for read, count in ((peek, 20), (read_records, 30)):
        with pytest.raises(DataError) as caught:
            read(source(path), "demonstration")
        message = str(caught.value)
        assert f"none of the {count} rows read is a demonstration; the first, f.jsonl:1: missing field" in message
        assert "Keys found: question, answer" in message
        assert "Known formats of a demonstration: messages; prompt + completion" in message
        assert str(pickle.loads(pickle.dumps(caught.value))) == message


def test_peek_reads_the_first_rows_only_and_leaves_hub_sources_alone(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": ""}\n' + "not json\n" * 50)
    assert peek(source(path), "prompt", rows=2) == Account(2, 1, (("empty prompt", 1),))
    assert peek(source(path, limit=1), "prompt") == Account(1, 1, ())
    assert peek(hub("nobody/nothing"), "prompt") is None
    made = write_dataset(tmp_path / "pairs", "comparison", train=[pair("Yes", "No")])
    with pytest.raises(DataError, match="is a comparison data set, where a prompt one is needed"):
        peek(source(made), "prompt")


@pytest.fixture
def hub_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A data set in a local folder, which `datasets` takes for an id."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", ROWS)
    return str(folder)


def test_a_hub_data_set_is_read_with_its_split_and_limit(hub_folder: str) -> None:
    reading = read_records(hub(hub_folder), "prompt")
    assert reading.account == Account(5, 5, ())
    assert reading.records[1].source == f"{hub_folder}/train:row 2"
    limited = read_records(hub(hub_folder, limit=2), "prompt")
    assert limited.records == reading.records[:2]
    assert limited.content_hash != reading.content_hash


def test_an_unknown_split_subset_or_id_is_an_error_that_says_what_to_check(hub_folder: str) -> None:
    with pytest.raises(DataError, match=r'Unknown split "test".*\[.train.\].; check subset, split and revision'):
        read_records(hub(hub_folder, split="test"), "prompt")
    with pytest.raises(DataError, match=r"'other' not found.*check subset"):
        read_records(hub(hub_folder, subset="other"), "prompt")
    with pytest.raises(DataError, match=r"there is no hub data set .*nowhere.*check hub"):
        read_records(hub(f"{hub_folder}/nowhere"), "prompt")


def test_an_unreachable_hub_is_an_error_that_says_how_to_do_without(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []

    def unreachable(hub: str, *, name: str, split: str, revision: str) -> None:
        asked.append((hub, name, split, revision))
        raise ConnectionError("Couldn't reach the hub")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(DataError, match=r"cannot reach hub data set a/b .*give its path"):
        read_records(hub("a/b", subset="c", split="d", revision="e"), "prompt")
    assert asked == [("a/b", "c", "d", "e")]


def test_the_content_hash_of_a_data_set_says_which_split_was_read(tmp_path: Path) -> None:
    made = write_dataset(
        tmp_path / "pairs", "comparison", train=[pair("Yes", "No")], held_out=[pair("Yes", "No", prompt="How?")]
    )
    sources = [SourceConfig(path=made, split=split) for split in ("train", "held_out")]
    train, held_out = (read_records(one, "comparison").content_hash for one in sources)
    assert train != held_out
