"""Damage to checkpoints: each file of each stage's, a bit flipped, cut short or gone, is found and fallen back from."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import align.artifacts
from align.artifacts import MANIFEST, newest_whole, read_artifact, write_directory
from align.checkpoints import load_newest
from align.errors import ArtifactError
from align.status import occupied
from stages.ppo.train import run_ppo
from tests.resident import resident
from tests.stages.scenes import context_of, ppo_config, ppo_inputs
from tests.stages.test_continuation import reward, sft, stop_at_line


def ppo(root: Path) -> object:
    return run_ppo(ppo_config(updates=4), ppo_inputs(root), context_of(resident(), root, "ppo"))


STAGES: dict[str, Callable[[Path], object]] = {"sft": sft, "reward": reward, "ppo": ppo}


@pytest.fixture(scope="module", params=STAGES)
def checkpoints(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints of a stage that was stopped; tests put back what they damage."""
    root = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        assert stop_at_line(3 if request.param == "ppo" else 5, lambda: STAGES[request.param](root), patch)  # type: ignore[arg-type]
    folders = sorted((root / request.param / "checkpoints").iterdir())
    for older in folders[:-2]:
        shutil.rmtree(older)
    return root / request.param / "checkpoints"


def flip(path: Path, generator: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    path.write_bytes(content)


def truncate(path: Path, generator: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: generator.randrange(path.stat().st_size)])


def remove(path: Path, generator: random.Random) -> None:
    path.unlink()


@pytest.mark.parametrize("damage", [flip, truncate, remove])
def test_damage_to_any_file_is_found_and_the_checkpoint_before_is_taken(
    damage: Callable[[Path, random.Random], None], checkpoints: Path
) -> None:
    older, newest = sorted(checkpoints.iterdir())
    identity = read_artifact(newest).base_identity
    generator = random.Random(0)
    for path in sorted(newest.iterdir()):
        whole = path.read_bytes()
        for _ in range(1 if damage is remove else 5):
            damage(path, generator)
            checkpoint, notes = load_newest(checkpoints, base_identity=identity)
            assert checkpoint is not None
            assert checkpoint.step == read_artifact(older).step, path
            assert newest.name in notes[0], path
            assert path.name in notes[0]
            path.write_bytes(whole)
    found, damaged = newest_whole(checkpoints)
    assert found is not None
    assert (found.path, damaged) == (newest, [])


def test_no_bit_of_a_manifest_can_flip_unseen(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "weights").write_text("w")

    artifact = write_directory(
        tmp_path / "adapter",
        fill,
        kind="adapter",
        stage="sft",
        step=3,
        base_identity="a" * 64,
    )
    path = artifact.path / MANIFEST
    whole = path.read_bytes()
    for place in range(8 * len(whole)):
        content = bytearray(whole)
        content[place // 8] ^= 1 << place % 8
        path.write_bytes(content)
        try:
            found = read_artifact(artifact.path)
        except ArtifactError:
            continue
        assert found == artifact, content  # white space for other white space


def test_a_file_that_cannot_be_read_counts_as_damaged(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    older, newest = sorted(checkpoints.iterdir())
    own = align.artifacts.sha256_of_file

    def unreadable(path: Path) -> str:
        if path.parent == newest:
            raise OSError(5, "Input/output error", str(path))
        return own(path)

    monkeypatch.setattr(align.artifacts, "sha256_of_file", unreadable)
    found, damaged = newest_whole(checkpoints)
    assert found is not None
    assert found.path == older
    assert "cannot be read: [Errno 5]" in damaged[0]


def test_what_a_killed_writer_left_is_cleared_away_before_and_after(tmp_path: Path) -> None:
    folders = (tmp_path, tmp_path / "sft", tmp_path / "sft" / "checkpoints")

    def leave() -> None:
        for folder in folders:
            for left in (".adapter.123.tmp", ".adapter.123.old", "adapter", ".mine.tmp"):
                (folder / left).mkdir(parents=True, exist_ok=True)
            (folder / ".result.json.7.tmp").touch()

    def there() -> list[set[str]]:
        own = {"sft", "checkpoints", ".lock"}
        return [{path.name for path in folder.iterdir()} - own for folder in folders]

    leave()
    with occupied(tmp_path):
        assert there() == [{"adapter", ".mine.tmp"}] * 3
        leave()
    assert there() == [{"adapter", ".mine.tmp"}] * 3
