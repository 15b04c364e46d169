"""A disk that is full or read-only while a stage writes: one clear error, the checkpoint before loads, and the run goes
on later."""

import subprocess
from collections.abc import Callable, Generator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from align.errors import StorageError
from align.tracking import Tracker
from tests.align.fake_stages import filling_the_disk
from tests.align.recipe import write_recipe
from tests.align.test_driver import run
from tests.stages.scenes import hashes_of
from tests.stages.test_continuation import sft


@pytest.fixture
def small_disk(tmp_path: Path) -> Generator[Path]:
    """4 MB of memory, mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"needs leave to mount: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)  # a worker that is being killed may still hold a log


def remount(folder: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", folder], check=True)


def fill_up(ballast: Path, *, room: int) -> None:
    """Write until nothing fits, then leave so many bytes."""
    with suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    with ballast.open("rb+") as file:
        file.truncate(ballast.stat().st_size - room)


def sft_until(step: int, fault: Callable[[], None], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train until the fault makes writing impossible, before the checkpoint of that step."""
    own: Any = Tracker.log

    def log(tracker: Tracker, at: int, metrics: dict[str, float]) -> None:
        own(tracker, at, metrics)
        if at == step:
            fault()

    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "log", log)
        sft(folder)


@pytest.mark.parametrize("room", [0, 100_000], ids=["none", "for some of the files"])
def test_a_disk_that_fills_up_costs_what_came_after_the_last_checkpoint(
    room: int, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sft(tmp_path / "whole")
    ballast = small_disk / "ballast"
    with pytest.raises(StorageError, match=r"cannot write .*No space left on device.*is kept"):
        sft_until(4, lambda: fill_up(ballast, room=room), small_disk, monkeypatch)
    assert [path.name for path in (small_disk / "sft" / "checkpoints").iterdir()] == ["update-00002"]
    ballast.unlink()
    sft(small_disk, resume=True)
    assert hashes_of(small_disk / "sft") == hashes_of(tmp_path / "whole" / "sft")


def test_a_disk_that_becomes_read_only_costs_what_came_after_the_last_checkpoint(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sft(tmp_path / "whole")
    with pytest.raises(StorageError, match=r"cannot write .*Read-only file system.*is kept"):
        sft_until(4, lambda: remount(small_disk, "ro"), small_disk, monkeypatch)
    remount(small_disk, "rw")
    assert [path.name for path in (small_disk / "sft" / "checkpoints").iterdir()] == ["update-00002"]
    sft(small_disk, resume=True)
    assert hashes_of(small_disk / "sft") == hashes_of(tmp_path / "whole" / "sft")


def test_a_disk_that_is_full_when_a_result_is_written_costs_that_stage_and_no_more(
    small_disk: Path, ray_cluster: None
) -> None:
    write_recipe(small_disk)
    run(small_disk, stage="sft")
    before = hashes_of(small_disk / "runs" / "small" / "sft")
    ballast = small_disk / "ballast"
    with pytest.raises(StorageError, match=r"cannot write .*result\.json.*No space left on device.*is kept"):
        run(small_disk, stage="reward", change={"reward": partial(filling_the_disk, ballast)})
    with pytest.raises(StorageError, match=r"cannot write .*No space left on device"):
        run(small_disk)
    ballast.unlink()
    assert run(small_disk, resume=True)["reward"]["accuracy"] == 0.9
    assert hashes_of(small_disk / "runs" / "small" / "sft") == before
