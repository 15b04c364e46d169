import json
import logging
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from align.errors import ArtifactError, InvariantError, StorageError
from align.status import read_status
from align.tracking import Tracker


def lines_of(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_metrics_and_clocks_go_to_files_of_their_own(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path / "ppo", stage="ppo")
    tracker.log(1, {"objective/kl": 0.5})
    tracker.log_timing(1, {"seconds/learn": 2.0})
    assert (tmp_path / "ppo" / "metrics.jsonl").read_text() == '{"step": 1, "objective/kl": 0.5}\n'
    timing = lines_of(tmp_path / "ppo" / "timings.jsonl")
    assert timing[0]["seconds/learn"] == 2.0
    assert "time" in timing[0]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_refused_by_name_and_not_written(value: float, tmp_path: Path) -> None:
    tracker = Tracker(tmp_path / "ppo", stage="ppo")
    with pytest.raises(InvariantError, match=r"ppo step 3: not finite: \{'loss/policy': -?(nan|inf)\}"):
        tracker.log(3, {"objective/kl": 0.5, "loss/policy": value})
    assert (tmp_path / "ppo" / "metrics.jsonl").read_text() == ""


def test_a_new_run_starts_new_files_and_a_resumed_one_keeps_them(tmp_path: Path) -> None:
    Tracker(tmp_path / "ppo", stage="ppo").log(1, {"x": 1.0})
    Tracker(tmp_path / "ppo", stage="ppo", resume=True).log(2, {"x": 2.0})
    assert [line["step"] for line in lines_of(tmp_path / "ppo" / "metrics.jsonl")] == [1, 2]
    Tracker(tmp_path / "ppo", stage="ppo")
    assert (tmp_path / "ppo" / "metrics.jsonl").read_text() == ""


def test_rewinding_drops_what_came_after_and_a_line_that_was_cut_off(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path / "ppo", stage="ppo")
    settled: list[dict[str, int]] = []
    for step in (1, 2, 3):
        tracker.log(step, {"x": step / 3})
        tracker.log_timing(step, {"seconds/learn": 1.0})
        settled.append(tracker.settle())
    path = tmp_path / "ppo" / "metrics.jsonl"
    first_two = "".join(path.read_text().splitlines(keepends=True)[:2])
    path.write_text(path.read_text() + '{"step": 4, "x"')
    tracker = Tracker(tmp_path / "ppo", stage="ppo", resume=True)
    tracker.rewind(settled[1])
    assert path.read_text() == first_two
    assert tracker.resumed_seconds() == 2.0  # of the lines that stay, and of nothing else in them
    second = lines_of(tmp_path / "ppo" / "timings.jsonl")[1]["time"]
    assert tracker.resumed_seconds(before=second) == 1.0
    assert [line["step"] for line in lines_of(tmp_path / "ppo" / "timings.jsonl")] == [1, 2]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"step": 1}\n', r"has 1 lines, but 2 when the checkpoint was made"),
        ('{"step": 1}\n{"step": 2}', r"has 1 lines, but 2"),
        ('{"step": 1}\n{"step"\n', r"metrics\.jsonl line 2 is damaged: "),
        ('{"step": 1}\n[2]\n', r"metrics\.jsonl line 2 is damaged: "),
    ],
)
def test_logs_that_lack_what_a_checkpoint_counted_are_refused(content: str, said: str, tmp_path: Path) -> None:
    tracker = Tracker(tmp_path / "ppo", stage="ppo")
    (tmp_path / "ppo" / "metrics.jsonl").write_text(content)
    with pytest.raises(ArtifactError, match=rf"{said}.*--fresh"):
        tracker.rewind({"metrics.jsonl": 2})
    assert (tmp_path / "ppo" / "metrics.jsonl").read_text() == content


def test_progress_is_one_whole_file_that_tells_the_last_metrics(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path / "ppo", stage="ppo")
    tracker.log(1, {"objective/kl": 0.5})
    tracker.progress(0, 10, "update 1/10")
    tracker.progress(10, 10, "done")
    status = json.loads((tmp_path / "status.json").read_text())
    assert {key: status[key] for key in ("stage", "doing", "done", "total", "metrics")} == {
        "stage": "ppo",
        "doing": "done",
        "done": 10,
        "total": 10,
        "metrics": {"objective/kl": 0.5},
    }
    assert status["started"] <= status["updated"]


def test_an_activity_that_begins_behind_where_the_last_one_was_is_another(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path / "ppo", stage="ppo")
    tracker.progress(10, 10, "epoch 1")
    first = read_status(tmp_path)
    tracker._last_write = 0.0  # pyright: ignore[reportPrivateUsage] # or it would come too soon to be written
    tracker.progress(3, 10, "epoch 2")
    second = read_status(tmp_path)
    assert first is not None
    assert second is not None
    assert (second.first_done, second.started > first.started) == (3, True)


def test_progress_in_between_is_written_at_most_five_times_a_second(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path / "ppo", stage="ppo")
    tracker.progress(0, 100, "learning")
    for done in range(1, 50):
        tracker.progress(done, 100, "learning")
    assert json.loads((tmp_path / "status.json").read_text())["done"] < 49


def test_tensorboard_is_written_only_if_asked_for(tmp_path: Path) -> None:
    Tracker(tmp_path / "sft", stage="sft").log(1, {"x": 1.0})
    assert not (tmp_path / "sft" / "tensorboard").exists()
    tracker = Tracker(tmp_path / "ppo", stage="ppo", tensorboard=True)
    tracker.log(1, {"x": 1.0})
    tracker.close()
    assert any((tmp_path / "ppo" / "tensorboard").iterdir())


def test_a_tensorboard_that_cannot_be_made_is_done_without(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "ppo").mkdir()
    (tmp_path / "ppo" / "tensorboard").write_text("in its place")
    tracker = Tracker(tmp_path / "ppo", stage="ppo", tensorboard=True)
    tracker.log(1, {"x": 1.0})
    tracker.close()
    assert lines_of(tmp_path / "ppo" / "metrics.jsonl") == [{"step": 1, "x": 1.0}]
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "ppo: TensorBoard's files cannot be written" in caplog.text


def test_a_tensorboard_that_fails_later_is_told_once_and_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self: object, name: str, value: float, step: int) -> None:
        raise OSError(28, "No space left on device")

    tracker = Tracker(tmp_path / "ppo", stage="ppo", tensorboard=True)
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", fail)
    for step in (1, 2):
        tracker.log(step, {"x": 1.0})
    tracker.close()
    assert [line["step"] for line in lines_of(tmp_path / "ppo" / "metrics.jsonl")] == [1, 2]
    assert caplog.text.count("No space left on device") == 1


def test_a_folder_that_has_vanished_is_named(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path / "run" / "ppo", stage="ppo")
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(StorageError, match=r"cannot write .*run/ppo/metrics\.jsonl"):
        tracker.log(1, {"x": 1.0})
    with pytest.raises(StorageError, match=r"cannot write .*run/ppo/metrics\.jsonl"):
        tracker.settle()
    with pytest.raises(StorageError, match=r"cannot write .*run/status\.json"):
        tracker.progress(0, 1, "learning")


def test_settled_logs_are_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = Tracker(tmp_path / "ppo", stage="ppo")
    tracker.log(1, {"x": 1.0})
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(Path(os.readlink(f"/proc/self/fd/{number}")).name))
    tracker.settle()
    assert synced == ["metrics.jsonl", "timings.jsonl"]


def test_each_activity_has_a_clock_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("align.tracking.time", SimpleNamespace(time=lambda: clock[0]))
    tracker = Tracker(tmp_path / "ppo", stage="ppo")
    told = ((100.0, 0, "reading"), (150.0, 10, "reading"), (160.0, 0, "learning"), (164.0, 10, "learning"))
    for now, done, doing in told:
        clock[0] = now
        tracker.progress(done, 10, doing)
    status = read_status(tmp_path)
    assert status is not None
    assert (status.doing, status.started, status.rate) == ("learning", 160.0, 2.5)


def test_the_pace_of_a_resumed_activity_is_its_own_whatever_came_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("align.tracking.time", SimpleNamespace(time=lambda: clock[0]))
    tracker = Tracker(tmp_path / "sft", stage="sft", resume=True)
    told = ((100.0, 0, 16, "tokenizing"), (101.0, 16, 16, "tokenizing"), (110.0, 100, 600, "training"))
    for now, done, total, doing in (*told, (114.0, 102, 600, "training")):
        clock[0] = now
        tracker.progress(done, total, doing)
    status = read_status(tmp_path)
    assert status is not None
    assert (status.started, status.rate) == (110.0, 0.5)
