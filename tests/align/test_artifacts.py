import json
import os
from pathlib import Path

import pytest

from align.artifacts import (
    MANIFEST,
    Artifact,
    clear_leftovers,
    read_artifact,
    read_json,
    sha256_of_json,
    write_directory,
    write_json,
)
from align.errors import ArtifactError, StorageError

BASE, OTHER_BASE = "a" * 64, "b" * 64


def write(path: Path, text: str = "one", *, base: str = BASE) -> Artifact:
    def fill(folder: Path) -> None:
        (folder / "weights.txt").write_text(text)
        (folder / "inner").mkdir()
        (folder / "inner" / "more.txt").write_text("more")

    return write_directory(path, fill, kind="adapter", stage="sft", step=3, base_identity=base)


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    artifact = write(tmp_path / "adapter")
    assert read_artifact(tmp_path / "adapter", base_identity=BASE) == artifact
    assert (artifact.kind, artifact.stage, artifact.step, artifact.base_identity) == ("adapter", "sft", 3, BASE)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]  # no temporary folder is left


def test_a_manifest_that_was_written_to_is_damaged_though_all_files_are_whole(tmp_path: Path) -> None:
    write(tmp_path / "adapter")
    manifest = tmp_path / "adapter" / MANIFEST
    manifest.write_text(manifest.read_text().replace(BASE, OTHER_BASE))
    with pytest.raises(ArtifactError, match="is not as it was written"):
        read_artifact(tmp_path / "adapter", base_identity=OTHER_BASE)


def test_equal_contents_have_equal_hashes_and_bytes_wherever_they_stand(tmp_path: Path) -> None:
    one, same, other = write(tmp_path / "1"), write(tmp_path / "2"), write(tmp_path / "3", "two")
    assert one.content_hash == same.content_hash != other.content_hash
    assert (tmp_path / "1" / MANIFEST).read_bytes() == (tmp_path / "2" / MANIFEST).read_bytes()


def test_an_error_while_filling_leaves_the_old_folder_whole_and_nothing_else(tmp_path: Path) -> None:
    old = write(tmp_path / "adapter")

    def fill(folder: Path) -> None:
        (folder / "weights.txt").write_text("half")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_directory(tmp_path / "adapter", fill, kind="adapter", stage="sft", step=4, base_identity=BASE)
    with pytest.raises(ZeroDivisionError):
        write_directory(tmp_path / "new", fill, kind="adapter", stage="sft", step=4, base_identity=BASE)
    assert read_artifact(tmp_path / "adapter") == old
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_full_disk_is_an_error_that_names_the_folder(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(ArtifactError, match=r"cannot write .*adapter: .*No space left.*another place"):
        write_directory(tmp_path / "adapter", fill, kind="adapter", stage="sft", step=4, base_identity=BASE)


def test_writing_again_replaces_all_that_was_there(tmp_path: Path) -> None:
    write(tmp_path / "adapter")
    write_directory(
        tmp_path / "adapter",
        lambda folder: (folder / "only.txt").touch(),
        kind="head",
        stage="reward",
        step=9,
        base_identity=BASE,
    )
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [MANIFEST, "only.txt"]
    assert read_artifact(tmp_path / "adapter").step == 9


@pytest.mark.parametrize(
    ("damage", "said"),
    [("change", "differs from"), ("truncate", "differs from"), ("delete", "is missing"), ("add", "is not in")],
)
def test_a_damaged_file_is_named(damage: str, said: str, tmp_path: Path) -> None:
    write(tmp_path / "adapter")
    file = tmp_path / "adapter" / "inner" / "more.txt"
    if damage == "delete":
        file.unlink()
    elif damage == "add":
        file = file.with_name("strange.txt")
        file.write_text("x")
    else:
        file.write_text({"change": "mora", "truncate": ""}[damage])
    with pytest.raises(ArtifactError, match=rf"is damaged: inner/{file.name} {said}"):
        read_artifact(tmp_path / "adapter")


def test_an_artifact_of_another_base_is_refused_naming_both(tmp_path: Path) -> None:
    write(tmp_path / "adapter", base=OTHER_BASE)
    with pytest.raises(ArtifactError, match=r"made on base b{16}….*this run's base is a{16}…"):
        read_artifact(tmp_path / "adapter", base_identity=BASE)


def test_a_missing_folder_and_one_without_a_manifest_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="there is no artifact at"):
        read_artifact(tmp_path / "adapter")
    (tmp_path / "adapter").mkdir()
    with pytest.raises(ArtifactError, match=rf"{MANIFEST} is missing"):
        read_artifact(tmp_path / "adapter")
    (tmp_path / "adapter" / MANIFEST).write_text("[]")
    with pytest.raises(ArtifactError, match="is not a manifest of align"):
        read_artifact(tmp_path / "adapter")
    (tmp_path / "adapter" / MANIFEST).write_text("{")
    with pytest.raises(ArtifactError, match=rf"{MANIFEST} is damaged"):
        read_artifact(tmp_path / "adapter")


def test_json_is_written_sorted_and_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"b": 1, "a": [2]})
    assert path.read_text() == '{\n "a": [\n  2\n ],\n "b": 1\n}\n'
    assert read_json(path) == {"a": [2], "b": 1}
    with pytest.raises(TypeError):
        write_json(path, {(1, 2): "a tuple is no key"})
    assert json.loads(path.read_text()) == {"a": [2], "b": 1}


def test_a_file_below_a_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot write .*file/x\.json"):
        write_json(tmp_path / "file" / "x.json", {})


def test_a_hash_of_json_does_not_depend_on_the_order_of_keys() -> None:
    assert sha256_of_json({"a": 1, "b": 2}) == sha256_of_json({"b": 2, "a": 1}) != sha256_of_json({"a": 2, "b": 1})


def test_all_that_is_written_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []

    def fsync(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))

    monkeypatch.setattr(os, "fsync", fsync)
    write(tmp_path / "adapter")
    temporary = f".adapter.{os.getpid()}.tmp"
    names = [path.relative_to(tmp_path).as_posix() for path in synced]
    inside = {"weights.txt", "inner", "inner/more.txt", MANIFEST}
    assert {temporary, *(f"{temporary}/{name}" for name in inside)} <= set(names)
    assert names[-1] == "."  # last the rename itself
    synced.clear()
    write_json(tmp_path / "a.json", 1)
    assert [path.name for path in synced] == [f".a.json.{os.getpid()}.tmp", tmp_path.name]
    write_json(tmp_path / "a.json", 1, durable=False)
    assert len(synced) == 2


def test_what_killed_writers_left_goes_wherever_they_write_and_nothing_else(tmp_path: Path) -> None:
    places = (tmp_path, tmp_path / "ppo", tmp_path / "ppo" / "checkpoints")
    for place in places:
        (place / ".update-00001.123.old").mkdir(parents=True)
        (place / ".update-00001.123.tmp").mkdir()
        (place / ".status.json.123.tmp").write_text("half")
        (place / ".notes.tmp").write_text("mine")
    clear_leftovers(tmp_path)
    assert [[path.name for path in place.glob(".*")] for place in places] == [[".notes.tmp"]] * 3


def test_what_was_replaced_is_gone(tmp_path: Path) -> None:
    write(tmp_path / "adapter")
    write(tmp_path / "adapter", "two")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
