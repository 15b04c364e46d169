"""Whole ingestions: what is kept, what is rejected and why, and that nothing is lost between."""

import gc
import json
import os
import pickle
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from align.artifacts import read_artifact
from align.config import SourceConfig
from align.errors import ArtifactError, DataError, InvariantError, UsageError
from align.fan_out import map_on_cluster
from align.installation import import_root
from data.codec import make_codec
from data.ingestion.find import IngestRequest
from data.ingestion.rules import TokenRule
from data.ingestion.run import Engine, ingest, local_engine
from data.ingestion.shapes import SHAPES
from data.ingestion.sift import Piece, Sifted
from data.sources import read_records
from data.tokenization import Codec
from tests.data.ingestion.sample_rows import MAPS, SAMPLES, outcomes, sample
from tests.data.small_tokenizers import chatml

Row = dict[str, Any]
SAMPLE_FILES = sorted(path.name for path in SAMPLES.iterdir())


def make(folder: Path, *sources: Path | str, engine: Engine | None = None, to: str = "set", **asked: Any) -> Path:
    """The data set's folder, of the sources with these settings; nothing is held out unless asked for."""
    given: Row = {"held_out_fraction": 0.0, **asked}
    settings = IngestRequest(tuple(map(str, sources)), **given)
    ingest(settings, folder / to, engine=engine or local_engine(1), note=noted.append, on_progress=lambda *_: None)
    return folder / to


noted: list[str] = []


def rows_of(dataset: Path, split: str = "train") -> list[Row]:
    return [row for path in sorted(dataset.glob(f"{split}-*.parquet")) for row in pq.read_table(path).to_pylist()]


def rejects_of(dataset: Path) -> list[Row]:
    with pa.CompressedInputStream(pa.OSFile(str(dataset / "rejects.jsonl.zst"), "rb"), "zstd") as file:
        return [json.loads(line) for line in file.read().splitlines()]


def account_of(dataset: Path) -> Row:
    account = cast(Row, json.loads((dataset / "account.json").read_text()))
    for own in (account, *account["sources"].values()):
        assert own["rows_in"] == own["kept"] + sum(own["rejected"].values())
    assert account["rows_in"] == sum(own["rows_in"] for own in account["sources"].values())
    assert account["kept"] == len(rows_of(dataset)) + len(rows_of(dataset, "held_out"))
    assert Counter(reject["reason"] for reject in rejects_of(dataset)) == account["rejected"]
    return account


def pair(prompt: str, chosen: str, rejected: str, **more: object) -> Row:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def written(path: Path, rows: list[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sample_settings(name: str) -> Row:
    return {"columns": tuple(MAPS[name].items())} if name in MAPS else {}


@pytest.mark.parametrize("name", SAMPLE_FILES)
def test_both_engines_make_the_same_bytes_of_every_shape(name: str, tmp_path: Path, ray_cluster: None) -> None:
    on_ray = partial(map_on_cluster, address="local", import_root=import_root())
    settings: Row = {**sample_settings(name), "near_threshold": 0.8, "held_out_fraction": 0.3}
    local = make(tmp_path, SAMPLES / name, to="local", **settings)
    other = make(tmp_path, SAMPLES / name, to="ray", engine=on_ray, **settings)
    account_of(local)
    files = sorted(path.name for path in local.iterdir())
    assert files == sorted(path.name for path in other.iterdir())
    assert [name for name in files if (local / name).read_bytes() != (other / name).read_bytes()] == []


@pytest.mark.parametrize("name", [name for name in SAMPLE_FILES if name not in MAPS])
def test_a_sample_gives_the_records_and_rejects_that_its_shape_says(name: str, tmp_path: Path) -> None:
    shape = SHAPES[name.removesuffix(".jsonl")]
    dataset = make(tmp_path, SAMPLES / name, keep_ties=True)
    account = account_of(dataset)
    alone = outcomes(shape, sample(shape.name))
    assert account["rows_in"] == len(alone)
    found = Counter(one[0] for one in alone if isinstance(one, tuple))
    together = {"exact duplicate", "contradictory", "identical after normalisation"}
    assert Counter({k: v for k, v in account["rejected"].items() if k not in together}) == found
    records = read_records(SourceConfig(path=dataset), shape.kind).records
    kept = [one for one in alone if not isinstance(one, tuple)]
    assert [record for record in records if replace(record, source="") not in kept] == []


def test_each_row_is_rejected_for_one_reason_and_kept_whole_beside_it(tmp_path: Path) -> None:
    rows = [
        pair("a question", "yes", "no"),
        pair("a question", "yes", "no"),
        pair("b question", "yes", " YES "),
        pair("c question", "yes", "yes"),
        pair("d question", "one", "two", preference=0.5),
        pair("e question", "one", "two"),
        pair("e question", "two", "one"),
        pair("f question", "", "no"),
        {"prompt": "g question", "chosen": "yes"},
        pair("h question", "fine", "bad", margin=2.0),
    ]
    path = written(tmp_path / "f.jsonl", rows)
    path.write_bytes(path.read_bytes() + b"{broken\n")
    dataset = make(tmp_path, path)
    reasons = {reject["line"]: reject["reason"] for reject in rejects_of(dataset)}
    assert reasons == {
        2: "exact duplicate",
        3: "identical after normalisation",
        4: "identical pair",
        5: "tie",
        6: "contradictory",
        7: "contradictory",
        8: "empty response",
        9: "missing field",
        11: "malformed",
    }
    lines = path.read_text().splitlines()
    for reject in rejects_of(dataset):
        assert reject["row"] == lines[reject["line"] - 1]
        assert reject["source"] == str(path)
    kept = [(row["line"], row["chosen"], row["margin"]) for row in rows_of(dataset)]
    assert kept == [(1, "yes", None), (10, "fine", 2.0)]
    assert account_of(dataset)["rows_in"] == 11
    ties = make(tmp_path, path, to="with-ties", keep_ties=True)
    assert [row["preference"] for row in rows_of(ties) if row["line"] == 5] == [0.5]


def test_a_prompt_never_crosses_splits_and_its_side_follows_the_seed(tmp_path: Path) -> None:
    rows = [pair(f"question {n % 40}", f"good {n}", f"bad {n}") for n in range(200)]
    path = written(tmp_path / "f.jsonl", rows)
    sides = []
    for seed in (0, 1):
        dataset = make(tmp_path, path, to=f"seed-{seed}", held_out_fraction=0.3, seed=seed)
        train, held_out = ({row["prompt"][0]["content"] for row in rows_of(dataset, s)} for s in ("train", "held_out"))
        assert not train & held_out
        assert len(train | held_out) == 40
        sides.append(held_out)
    assert sides[0] != sides[1]


def test_held_out_sources_are_held_out_and_what_leaks_from_them_is_not_trained_on(tmp_path: Path) -> None:
    words = " ".join(f"word{n}" for n in range(60))
    train = [pair("Shared question", "a", "b"), pair(f"{words} and so on", "c", "d"), pair("own question", "e", "f")]
    held_out = [pair("shared  question", "g", "h"), pair(f"{words} and so forth", "i", "j")]
    paths = [written(tmp_path / name, rows) for name, rows in (("t.jsonl", train), ("h.jsonl", held_out))]
    dataset = make(tmp_path, paths[0], held_out=(str(paths[1]),), near_threshold=0.8)
    assert [row["line"] for row in rows_of(dataset)] == [3]
    assert [row["line"] for row in rows_of(dataset, "held_out")] == [1, 2]
    assert account_of(dataset)["rejected"] == {"prompt is held out": 1, "prompt is nearly held out": 1}


def test_near_duplicates_are_alike_in_prompt_and_in_responses(tmp_path: Path) -> None:
    words = [f"word{n}" for n in range(80)]
    prompt, chosen, rejected = " ".join(words), " ".join(words[::-1]), " ".join(words[::3])
    rows = [
        pair(prompt, chosen, rejected),
        pair(prompt + " end", chosen + " end", rejected + " end"),
        pair(prompt, rejected, "something else altogether, which shares no words with the first at all"),
    ]
    dataset = make(tmp_path, written(tmp_path / "f.jsonl", rows), near_threshold=0.8)
    assert [(reject["line"], reject["reason"]) for reject in rejects_of(dataset)] == [(2, "near duplicate")]


loaded: list[str] = []


def small_codec(name: str, system_prompt: str | None) -> Codec:
    loaded.append(name)
    tokenizer = chatml()
    return make_codec(tokenizer, eos_ids=[cast(int, tokenizer.eos_token_id)], system_prompt=system_prompt)


def test_a_process_loads_one_tokenizer_however_many_pieces_come_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import data.ingestion.find

    def pickled(function: Any, pieces: Any) -> Any:
        return [pickle.loads(pickle.dumps(function))(piece) for piece in pieces]

    monkeypatch.setattr(data.ingestion.find, "cut", partial(data.ingestion.find.cut, chunk_bytes=200))
    rows = [pair(f"question {n}", "good", "bad") for n in range(40)]
    loaded.clear()
    rule = TokenRule(99, "one a process", None, small_codec)
    make(tmp_path, written(tmp_path / "f.jsonl", rows), tokens=rule, engine=pickled)
    assert loaded == ["one a process"]


@pytest.mark.parametrize("max_length", [60, 75, 90])
def test_token_lengths_reject_what_a_stage_would_set_aside_and_nothing_else(tmp_path: Path, max_length: int) -> None:
    from data.tokenization import encode_comparisons

    rows = [pair(f"question {n}", "y" * n, "n" * (100 - n)) for n in range(1, 100, 3)]
    path = written(tmp_path / "f.jsonl", rows)
    dataset = make(tmp_path, path, tokens=TokenRule(max_length, "small", None, small_codec))
    records = read_records(SourceConfig(path=path), "comparison").records
    _, rejects = encode_comparisons(small_codec("small", None), records, max_length=max_length)
    assert 0 < len(rejects) <= len(rows)
    assert [(r["line"], r["reason"]) for r in rejects_of(dataset)] == [
        (int(reject.source.split(":")[1]), reject.reason) for reject in rejects
    ]


def test_several_files_of_other_shapes_make_one_set_with_an_account_of_each(tmp_path: Path) -> None:
    one = written(tmp_path / "a.jsonl", [pair("a", "b", "c")] * 2)
    two = written(tmp_path / "b.jsonl", [{"instruction": "d", "chosen": "e", "rejected": "f"}])
    dataset = make(tmp_path, str(tmp_path / "*.jsonl"))
    account = account_of(dataset)
    assert {Path(name).name: own["kept"] for name, own in account["sources"].items()} == {"a.jsonl": 1, "b.jsonl": 1}
    shapes = json.loads((dataset / "dataset.json").read_text())["shapes"]
    assert shapes == {str(one): "trl-preference", str(two): "alpaca-preference"}
    card = (dataset / "datacard.md").read_text()
    assert "| exact duplicate | 1 |" in card
    assert f"| {two} | alpaca-preference | 1 | 1 | 0 |" in card
    assert "- mean length of chosen: 1.0 characters" in card


def test_the_card_says_how_often_the_longer_response_is_the_chosen_one_and_how_many_are_good(tmp_path: Path) -> None:
    rows = [
        pair("a", "long one", "short"),
        pair("b", "short", "long one"),
        pair("c", "longest of all", "x"),
        pair("d", "x", "y"),
    ]
    card = (make(tmp_path, written(tmp_path / "f.jsonl", rows)) / "datacard.md").read_text()
    assert "the longer response is the chosen one: 0.667 [0.208, 0.939] of 3" in card
    verdicts = [{"prompt": f"p{n}", "completion": "x", "label": n < 3} for n in range(4)]
    card = (make(tmp_path, written(tmp_path / "v.jsonl", verdicts), to="verdicts") / "datacard.md").read_text()
    assert "- good: 3 of 4" in card


def test_rows_of_files_in_many_pieces_keep_their_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import data.ingestion.find

    rows = [pair(f"question {n}", "good", "bad" if n % 7 else "good") for n in range(100)]
    path = written(tmp_path / "f.jsonl", rows)
    whole = make(tmp_path, path, to="whole")
    monkeypatch.setattr(data.ingestion.find, "cut", partial(data.ingestion.find.cut, chunk_bytes=500))
    pieces = make(tmp_path, path, to="pieces")
    assert rows_of(pieces) == rows_of(whole)
    assert rejects_of(pieces) == rejects_of(whole)
    assert [row["line"] for row in rows_of(pieces)] == [n + 1 for n in range(100) if n % 7]


def test_a_file_that_ends_too_soon_is_warned_of_and_its_rows_are_kept(tmp_path: Path) -> None:
    import gzip

    path = tmp_path / "f.jsonl.gz"
    rows = [pair(f"question {n * 7919 % 10_007}", f"good {n}", "bad") for n in range(3000)]
    content = gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())
    path.write_bytes(content[: len(content) // 2])
    noted.clear()
    account = account_of(make(tmp_path, path))
    assert account["kept"] > 500
    assert account["rejected"] == {"malformed": 1}
    assert any(note.startswith("warning") and "cut short" in note for note in noted), noted


def test_an_empty_file_among_others_is_named_and_all_empty_is_an_error(tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    noted.clear()
    account_of(make(tmp_path, empty, written(tmp_path / "f.jsonl", [pair("a", "b", "c")])))
    assert f"warning: {empty} is empty" in noted
    with pytest.raises(DataError, match="all sources are empty"):
        make(tmp_path, empty, to="none")
    assert not (tmp_path / "none").exists()


def test_a_set_without_a_fit_row_is_not_made_and_the_error_says_why(tmp_path: Path) -> None:
    path = written(tmp_path / "f.jsonl", [pair("a", "b", "b")] * 3)
    with pytest.raises(DataError, match=r"no row is fit.*identical pair 3.*f\.jsonl:1"):
        make(tmp_path, path)
    assert [p.name for p in tmp_path.iterdir()] == ["f.jsonl"]


def test_what_is_there_is_not_replaced_and_what_a_killed_run_left_is_cleared(tmp_path: Path) -> None:
    path = written(tmp_path / "f.jsonl", [pair("a", "b", "c")])
    left, running = tmp_path / ".set.99999999.scratch", tmp_path / f".other.{os.getpid()}.scratch"
    for folder in (left, running):
        folder.mkdir()
    make(tmp_path, path)
    assert not left.exists()
    assert running.exists()
    with pytest.raises(UsageError, match=r"cannot write beside .*f\.jsonl/set: .*Not a directory.*another folder"):
        make(path, path)
    with pytest.raises(UsageError, match="is there already"):
        make(tmp_path, path)


def test_other_kinds_in_one_set_are_refused(tmp_path: Path) -> None:
    one = written(tmp_path / "a.jsonl", [pair("a", "b", "c")])
    two = written(
        tmp_path / "b.jsonl", [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    )
    with pytest.raises(
        DataError,
        match=r"of one kind: .*holds demonstrations",
    ):
        make(tmp_path, one, two)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"shape": "hh"}, "--format hh: known are .*hh-rlhf"),
        ({"shape": "hh-rlhf", "columns": (("text", "a"),)}, "give one of them"),
        ({"weights": (1.0, 2.0)}, "one above 0 for each of the 1 sources, not 1, 2"),
        ({"weights": (0.0,)}, "one above 0"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(tmp_path: Path, asked: Row, message: str) -> None:
    path = written(tmp_path / "f.jsonl", [pair("a", "b", "c")])
    with pytest.raises(UsageError, match=message):
        make(tmp_path, path, **asked)


def test_a_stage_reads_both_splits_and_notices_a_changed_file(tmp_path: Path) -> None:
    rows = [pair(f"question {n}", f"good {n}", f"bad {n}", margin=1.5) for n in range(50)]
    dataset = make(tmp_path, written(tmp_path / "f.jsonl", rows), held_out_fraction=0.3)
    readings = [read_records(SourceConfig(path=dataset, split=split), "comparison") for split in ("train", "held_out")]
    assert sum(len(reading.records) for reading in readings) == 50
    assert {record.margin for reading in readings for record in reading.records} == {1.5}
    assert all(read_artifact(dataset).content_hash in reading.content_hash for reading in readings)
    with pytest.raises(DataError, match="is a comparison data set, where a demonstration one is needed"):
        read_records(SourceConfig(path=dataset), "demonstration")
    (dataset / "train-00000.parquet").write_bytes(b"changed")
    with pytest.raises(ArtifactError, match="damaged"):
        read_records(SourceConfig(path=dataset), "comparison")


def failing(piece: Piece) -> Sifted:
    raise DataError(f"no luck with {piece.source.name}")


def test_an_error_on_the_cluster_arrives_as_it_was_raised(tmp_path: Path, ray_cluster: None) -> None:
    def engine(function: Any, pieces: Any) -> Any:
        return map_on_cluster(failing, pieces, address="local", import_root=import_root())

    path = written(tmp_path / "f.jsonl", [pair("a", "b", "c")])
    with pytest.raises(DataError, match=r"no luck with .*f\.jsonl"):
        make(tmp_path, path, engine=engine)
    assert [p.name for p in tmp_path.iterdir()] == ["f.jsonl"]


def test_a_long_broken_first_line_costs_itself_alone(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    path.write_bytes(b"x" * (5 << 20) + b"\n" + json.dumps(pair("a", "b", "c")).encode())
    dataset = make(tmp_path, path)
    assert account_of(dataset)["rejected"] == {"malformed": 1}
    assert [row["line"] for row in rows_of(dataset)] == [2]
    assert len(rejects_of(dataset)[0]["row"]) == 5 << 20


def test_near_duplicates_of_a_row_that_is_rejected_itself_are_kept(tmp_path: Path) -> None:
    words = [f"word{n}" for n in range(200)]
    texts = [" ".join(words[8 * n : 8 * n + 90]) for n in range(4)]  # neighbours are alike at 0.83, others at 0.69
    rows = [pair("one prompt for all of them", text, "a rejected answer that is the same for all") for text in texts]
    dataset = make(tmp_path, written(tmp_path / "f.jsonl", rows), near_threshold=0.77)
    assert [row["line"] for row in rows_of(dataset)] == [1, 3]


def test_the_opposite_preference_is_a_contradiction_whatever_the_white_space_and_never_a_near_duplicate(
    tmp_path: Path,
) -> None:
    long = " ".join(f"word{n}" for n in range(60))
    rows = [
        pair("Some question ", "yes", "no"),
        pair("some question", "no", "Yes"),
        pair("another", long, "no " + long[::-1]),
        pair("another", "no " + long[::-1] + " x", long + " x"),
    ]
    dataset = make(tmp_path, written(tmp_path / "f.jsonl", rows), near_threshold=0.7)
    assert account_of(dataset)["rejected"] == {"contradictory": 2}


def test_a_tree_that_is_rejected_in_many_parts_stands_whole_once(tmp_path: Path) -> None:
    replies = [{"text": f"answer {n}", "role": "assistant", "rank": n, "replies": []} for n in range(5)]
    tree = {"message_tree_id": "t", "prompt": {"text": "why", "role": "prompter", "replies": replies}}
    path = written(tmp_path / "f.jsonl", [tree, tree])
    dataset = make(tmp_path, path)
    assert account_of(dataset)["rejected"] == {"exact duplicate": 4}
    assert [bool(reject["row"]) for reject in rejects_of(dataset)] == [True, False, False, False]


def test_more_pieces_than_files_may_be_open_are_no_trouble(tmp_path: Path) -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    for n in range(80):
        written(tmp_path / f"{n:02}.jsonl", [pair(f"question {n}", "a", "b")])
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 40, before[1]))
    try:
        dataset = make(tmp_path, str(tmp_path / "*.jsonl"), near_threshold=0.8)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert account_of(dataset)["kept"] == 80


def test_folders_of_the_user_that_look_like_ours_are_left_alone(tmp_path: Path) -> None:
    for name in (".set.2024999999", ".set.99999999.old-notes", ".sets.99999999.tmp"):
        (tmp_path / name).mkdir()
    make(tmp_path, written(tmp_path / "f.jsonl", [pair("a", "b", "c")]))
    assert {".set.2024999999", ".set.99999999.old-notes", ".sets.99999999.tmp"} <= {p.name for p in tmp_path.iterdir()}


def test_rows_in_are_counted_where_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import data.ingestion.write

    monkeypatch.setattr(data.ingestion.write, "_rejected", lambda piece, among: iter(()))
    path = written(tmp_path / "f.jsonl", [pair("a", "b", "c"), pair("d", "e", "e")])
    with pytest.raises(InvariantError, match="2 rows in, but 1 kept and 0 rejected"):
        make(tmp_path, path)
    assert [p.name for p in tmp_path.iterdir()] == ["f.jsonl"]


def test_a_hub_data_set_is_ingested_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    import data.ingestion.find

    def load(source: SourceConfig) -> datasets.Dataset:
        assert (source.hub, source.split) == ("owner/name", "test")
        return datasets.Dataset.from_list([pair(f"question {n}", "good", "bad") for n in range(5)])

    monkeypatch.setattr(data.ingestion.find, "load_hub", load)
    dataset = make(tmp_path, "hub:owner/name:test")
    assert list(account_of(dataset)["sources"]) == ["hub:owner/name:test"]
    assert [row["line"] for row in rows_of(dataset)] == [1, 2, 3, 4, 5]


def test_sources_are_mixed_by_weight_and_what_is_not_drawn_is_accounted_for(tmp_path: Path) -> None:
    paths = [
        written(tmp_path / f"{name}.jsonl", [pair(f"{name} {n}", "good", "bad") for n in range(size)])
        for name, size in (("a", 60), ("b", 20))
    ]
    account = account_of(make(tmp_path, *paths, weights=(1.0, 2.0)))
    assert {Path(name).stem: own["kept"] for name, own in account["sources"].items()} == {"a": 10, "b": 20}
    assert account["rejected"] == {"not drawn by weight": 50}


def test_what_a_process_that_still_runs_has_beside_the_set_is_left_alone(tmp_path: Path) -> None:
    running = tmp_path / f".set.{os.getppid()}.scratch"
    running.mkdir()
    make(tmp_path, written(tmp_path / "f.jsonl", [pair("a", "b", "c")]))
    assert running.exists()


def test_pieces_may_come_back_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import data.ingestion.find

    path = written(tmp_path / "f.jsonl", [pair(f"question {n}", "good", "bad") for n in range(50)])
    monkeypatch.setattr(data.ingestion.find, "cut", partial(data.ingestion.find.cut, chunk_bytes=500))
    whole = make(tmp_path, path, to="whole")
    backwards = make(tmp_path, path, to="backwards", engine=lambda sift, pieces: [sift(one) for one in pieces][::-1])
    assert rows_of(backwards) == rows_of(whole)


def test_how_alike_near_duplicates_are_is_as_asked_for(tmp_path: Path) -> None:
    same, one, other = (" ".join(f"{word}{n}" for n in range(size)) for word, size in (("w", 60), ("x", 20), ("y", 20)))
    rows = [pair(same, f"{same} {one}", "no"), pair(same, f"{same} {other}", "no")]  # 56 of 96 shingles are common
    path = written(tmp_path / "f.jsonl", rows)
    kept = [account_of(make(tmp_path, path, to=str(at), near_threshold=at))["kept"] for at in (0.5, 0.8)]
    assert kept == [1, 2]


def test_two_verdicts_on_one_answer_are_a_contradiction_and_no_duplicate(tmp_path: Path) -> None:
    rows = [{"prompt": "why", "completion": "so", "label": label} for label in (True, False)]
    rows.append({"prompt": "how", "completion": "so", "label": True})
    assert account_of(make(tmp_path, written(tmp_path / "f.jsonl", rows)))["rejected"] == {"contradictory": 2}


def _memory_pool_of(_: object) -> str:
    return f"{pa.default_memory_pool().backend_name} {gc.isenabled()}"


def test_processes_that_read_give_arrows_memory_back_and_look_for_no_cycles() -> None:
    execute = cast(Any, local_engine(2))
    assert list(execute(_memory_pool_of, [1, 2])) == ["system False"] * 2
