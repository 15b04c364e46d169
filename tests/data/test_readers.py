"""The same rows, whatever the file is and however it is cut."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.errors import DataError
from data.readers import Damage, RawRow, as_text, count_rows, cut, decode, kind_of_file, raw_rows

ROWS: list[dict[str, object]] = [{"prompt": f"question {n} ü", "n": n} for n in range(40)]


def read(path: Path, chunk_bytes: int = 8 << 20) -> list[tuple[int, object]]:
    """(line, row) of the whole file, from its chunks."""
    found: list[tuple[int, object]] = []
    before = 0
    for chunk in cut(path, chunk_bytes):
        found += [(before + raw.line, decode(raw)) for raw in raw_rows(chunk)]
        before += count_rows(chunk)
    return found


def written(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def jsonl(rows: list[dict[str, object]], newline: str = "\n") -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + newline for row in rows).encode()


@pytest.mark.parametrize("chunk_bytes", [1, 7, 64, 1000, 1 << 20])
def test_json_lines_are_the_same_rows_however_they_are_cut(tmp_path: Path, chunk_bytes: int) -> None:
    path = written(tmp_path, "f.jsonl", jsonl(ROWS))
    assert read(path, chunk_bytes) == [(n + 1, row) for n, row in enumerate(ROWS)]


@given(
    lines=st.lists(st.sampled_from([b"", b" ", b"{}", b'{"a": 1}', b"x", b"\xff"]), max_size=12),
    cut_at=st.integers(1, 9),
)
def test_blank_and_broken_lines_keep_their_numbers_however_they_are_cut(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], cut_at: int
) -> None:
    path = written(tmp_path_factory.mktemp("lines"), "f.jsonl", b"\n".join(lines))
    expected = [n for n, line in enumerate(lines, start=1) if line.strip()]
    assert [line for line, _ in read(path, cut_at)] == expected
    assert read(path, cut_at) == read(path)


def compressed(folder: Path, name: str, content: bytes) -> Path:
    """The content as the file's name says."""
    path = folder / name
    if name.endswith(".zst"):
        with pa.CompressedOutputStream(pa.OSFile(str(path), "wb"), "zstd") as out:
            out.write(content)
    else:
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


@pytest.mark.parametrize("name", ["f.jsonl.gz", "f.ndjson.zst", "f.json", "f.json.gz", "f.csv", "f.tsv.zst"])
def test_every_kind_of_file_holds_the_same_rows(tmp_path: Path, name: str) -> None:
    separator = "\t" if ".tsv" in name else ","
    delimited = "".join(f"{row['prompt']}{separator}{row['n']}\r\n" for row in ROWS)
    contents = {"json": json.dumps(ROWS).encode(), "jsonl": jsonl(ROWS), "ndjson": jsonl(ROWS)}
    is_text = name.split(".")[1] not in contents
    path = compressed(tmp_path, name, contents.get(name.split(".")[1], f"prompt{separator}n\r\n{delimited}".encode()))
    expected = [{"prompt": row["prompt"], "n": str(row["n"])} for row in ROWS] if is_text else ROWS
    assert [row for _, row in read(path, chunk_bytes=200)] == expected


def test_parquet_is_cut_by_row_groups(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "f.parquet", row_group_size=7)
    assert len(cut(tmp_path / "f.parquet", 200)) > 2
    assert read(tmp_path / "f.parquet", 200) == [(n + 1, row) for n, row in enumerate(ROWS)]


def test_a_json_array_larger_than_what_is_read_at_a_time_is_read_whole(tmp_path: Path) -> None:
    rows = [{"prompt": "x" * 300_000, "n": n} for n in range(9)]
    assert [row for _, row in read(written(tmp_path, "f.json", json.dumps(rows, indent=1).encode()))] == rows


def test_an_array_with_a_mistake_gives_the_rows_before_it(tmp_path: Path) -> None:
    found = read(written(tmp_path, "f.json", b'[{"a": 1}, {"a": 2}, {"a": ], {"a": 4}]'))
    assert [row for _, row in found[:2]] == [{"a": 1}, {"a": 2}]
    assert [line for line, _ in found] == [1, 2, 3]
    assert isinstance(found[2][1], Damage)
    assert found[2][1].ends_file


def test_byte_order_marks_and_carriage_returns_are_no_part_of_a_row(tmp_path: Path) -> None:
    content = b"\xef\xbb\xbf" + jsonl(ROWS[:3], newline="\r\n")
    assert read(written(tmp_path, "f.jsonl", content)) == [(n + 1, row) for n, row in enumerate(ROWS[:3])]
    content = "\ufeffprompt,n\r\nhello,1\r\n".encode()
    assert read(written(tmp_path, "f.csv", content)) == [(2, {"prompt": "hello", "n": "1"})]


def test_delimited_rows_are_numbered_by_the_line_that_they_begin_on(tmp_path: Path) -> None:
    found = read(written(tmp_path, "f.csv", b'a,b\n"two\nlines",1\nx,2\nonly one\n'))
    assert found[:2] == [(2, {"a": "two\nlines", "b": "1"}), (4, {"a": "x", "b": "2"})]
    assert found[2] == (5, Damage("1 fields, where the header has 2", row='["only one"]'))


@pytest.mark.parametrize("name", ["f.jsonl.gz", "f.csv.gz", "f.jsonl.zst"])
def test_a_file_that_was_cut_short_gives_its_rows_and_then_says_so(tmp_path: Path, name: str) -> None:
    content = (
        b"a,b\n" * 20_000 if ".csv" in name else jsonl([dict[str, object](n=n * 7919 % 100_003) for n in range(20_000)])
    )
    path = compressed(tmp_path, name, content)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    found = read(path)
    assert not any(isinstance(row, Damage) for _, row in found[:-1])
    damage = found[-1][1]
    assert isinstance(damage, Damage)
    assert damage.ends_file
    assert "cut short" in damage.detail


def test_an_unknown_kind_a_folder_and_a_missing_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"f\.txt: unknown kind of file; known are \.jsonl"):
        kind_of_file(Path("f.txt"))
    with pytest.raises(DataError, match=r"f\.parquet\.gz: unknown kind"):
        kind_of_file(Path("f.parquet.gz"))
    with pytest.raises(DataError, match="it is a folder, and no data set of align ingest; name a file"):
        cut(tmp_path)
    (tmp_path / "a.csv").touch()
    with pytest.raises(DataError, match=rf"; align ingest '{tmp_path}/\*\.csv' --to FOLDER makes one of its files"):
        cut(tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        cut(tmp_path / "none.jsonl")


def test_a_rejected_row_is_kept_as_it_was() -> None:
    assert as_text(b'{"a": "\xff"}') == '{"a": "\\xff"}'
    assert as_text({"a": "ü", "n": 1}) == '{"a": "ü", "n": 1}'
    assert decode(RawRow(1, b"[1]")) == Damage("no object: b'[1]'")
    latin = "not UTF-8 from byte 10 of the row on; save the file as UTF-8"
    assert decode(RawRow(1, b'{"a": "caf\xe9"}')) == Damage(latin)


@pytest.mark.parametrize("after", [b"\n[{}]", b" trailing", b"x" * (3 << 20)])
def test_more_after_the_end_of_an_array_is_named(tmp_path: Path, after: bytes) -> None:
    found = read(written(tmp_path, "f.json", b'[{"a": 1}, {"a": 2}]' + after))
    assert [row for _, row in found[:2]] == [{"a": 1}, {"a": 2}]
    damage = found[2][1]
    assert isinstance(damage, Damage)
    assert "more after the array's end" in damage.detail


def test_a_number_at_the_border_of_what_is_read_is_one_element(tmp_path: Path) -> None:
    content = b"[" + b" " * ((1 << 20) - 4) + b'12345, {"a": 1}]'
    assert [type(row).__name__ for _, row in read(written(tmp_path, "f.json", content))] == ["Damage", "dict"]


def test_a_bad_byte_in_an_array_costs_its_own_row_alone(tmp_path: Path) -> None:
    rows = [row for _, row in read(written(tmp_path, "f.json", b'[{"a": "\xe9"}, {"a": "fine"}]'))]
    assert rows == [{"a": "\udce9"}, {"a": "fine"}]


def test_fields_of_delimited_text_may_be_long(tmp_path: Path) -> None:
    content = "a,b\n" + "x" * 200_000 + ",1\ny,2\n"
    assert [line for line, _ in read(written(tmp_path, "f.csv", content.encode()))] == [2, 3]


def test_a_header_that_names_a_column_twice_is_named(tmp_path: Path) -> None:
    (_, damage), *rest = read(written(tmp_path, "f.csv", b"a,b,a\n1,2,3\n"))
    assert isinstance(damage, Damage)
    assert "the header names a more than once" in damage.detail
    assert rest == []


def test_a_damaged_row_group_costs_its_own_rows_alone(tmp_path: Path) -> None:
    path = tmp_path / "f.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=10, compression="none", use_dictionary=False)
    with pq.ParquetFile(path) as file:
        column = file.metadata.row_group(1).column(0)
        start, size = column.data_page_offset, column.total_compressed_size
    content = bytearray(path.read_bytes())
    content[start : start + size] = b"\xff" * size
    path.write_bytes(content)
    found = read(path)
    assert [line for line, _ in found] == list(range(1, 41))
    assert [line for line, row in found if isinstance(row, Damage)] == list(range(11, 21))


def test_a_text_that_is_no_utf8_costs_its_own_row_alone(tmp_path: Path) -> None:
    texts = pa.array([b"fine", b"\xff\xfe", b"fine too"]).view(pa.string())
    pq.write_table(pa.table({"a": texts}), tmp_path / "f.parquet")
    found = [row for _, row in read(tmp_path / "f.parquet")]
    assert (found[0], found[2]) == ({"a": "fine"}, {"a": "fine too"})
    assert isinstance(found[1], Damage)


def test_a_file_that_may_not_be_read_is_an_error_and_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, "f.jsonl.gz", b"")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=r"f\.jsonl\.gz: it cannot be read: Permission denied"):
        cut(path)


def test_more_after_an_array_that_ends_with_what_was_read_at_a_time_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = b'[{"a": 1}]'
    monkeypatch.setattr("data.readers._PIECE", len(array))
    (row, damage) = (
        raw.content for chunk in cut(written(tmp_path, "f.json", array + b' {"a": 2}')) for raw in raw_rows(chunk)
    )
    assert row == {"a": 1}
    assert isinstance(damage, Damage)
    assert "more after the array's end" in damage.detail


def test_a_row_with_a_field_too_many_is_kept_whole_beside_its_reason(tmp_path: Path) -> None:
    path = written(tmp_path, "f.csv", b"prompt,text\nwhy,because,really\n")
    (raw,) = (raw for chunk in cut(path) for raw in raw_rows(chunk))
    assert json.loads(as_text(raw.content)) == ["why", "because", "really"]
