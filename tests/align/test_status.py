import json
import os
import time
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from align.errors import UsageError
from align.show import clock, pace, state_view
from align.status import Status, occupied, read_state, read_status, write_end
from align.stopping import ask_to_stop, is_asked_to_stop
from align.tracking import Tracker

NOW = 1_000_000.0


def leave_run(run: Path, *, updated: float | None = NOW, finished: tuple[str, ...] = ()) -> None:
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text("run: {stages: [sft, ppo]}")
    for step in finished:
        (run / step).mkdir()
        (run / step / "result.json").write_text("{}")
    if updated is not None:
        status = {"stage": "ppo", "doing": "update 2", "done": 2, "total": 10, "started": updated - 4,
                  "updated": updated, "metrics": {"objective/kl": 0.5}}  # fmt: skip
        (run / "status.json").write_text(json.dumps(status))


def test_what_was_made_from_a_step_that_is_run_again_is_to_go(tmp_path: Path) -> None:
    leave_run(tmp_path, finished=("sft", "evaluation"))
    state = read_state(tmp_path, NOW)
    assert (state.finished_steps, state.steps_to_go) == (("sft",), ("ppo", "evaluation"))


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no run in this folder"):
        read_state(tmp_path / "none", NOW)


def test_a_run_that_has_not_come_past_its_data_is_there_all_the_same(tmp_path: Path) -> None:
    with occupied(tmp_path):
        assert read_state(tmp_path, NOW).state == "running"
        write_end(tmp_path, "prompts.jsonl is empty")
    state = read_state(tmp_path, NOW)
    assert (state.state, state.error) == ("stopped", "prompts.jsonl is empty")


def test_a_config_that_is_no_text_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="cannot be read as the config of a run"):
        read_state(tmp_path, NOW)


def test_a_run_is_stopped_once_it_is_silent_for_a_minute(tmp_path: Path) -> None:
    leave_run(tmp_path)
    assert read_state(tmp_path, NOW + 59).state == "running"
    assert read_state(tmp_path, NOW + 61).state == "stopped"


def test_what_a_killed_writer_leaves_goes_when_a_driver_comes_and_when_it_goes(tmp_path: Path) -> None:
    (tmp_path / ".status.json.1.tmp").touch()
    with occupied(tmp_path):
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock"]
        (tmp_path / ".status.json.2.tmp").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock"]


def test_a_silent_run_whose_driver_lives_is_running(tmp_path: Path) -> None:
    leave_run(tmp_path)
    with occupied(tmp_path):
        assert read_state(tmp_path, NOW + 1000).state == "running"
    assert read_state(tmp_path, NOW + 1000).state == "stopped"


def test_a_run_of_this_machine_that_holds_no_lock_does_not_run(tmp_path: Path) -> None:
    leave_run(tmp_path)
    with occupied(tmp_path):
        assert read_state(tmp_path, NOW).state == "running"
    assert read_state(tmp_path, NOW).state == "stopped"
    (tmp_path / ".lock").write_text("pid 7 on another-machine\n")
    assert read_state(tmp_path, NOW).state == "running"


def test_a_run_that_said_why_it_stopped_is_stopped_at_once(tmp_path: Path) -> None:
    leave_run(tmp_path)
    write_end(tmp_path, "out of memory")
    state = read_state(tmp_path, NOW)
    assert (state.state, state.error) == ("stopped", "out of memory")


def test_a_run_is_finished_when_all_its_steps_are_evaluation_included(tmp_path: Path) -> None:
    leave_run(tmp_path / "a", finished=("sft", "ppo"))
    state = read_state(tmp_path / "a", NOW + 100)
    assert (state.state, state.finished_steps, state.steps_to_go) == ("stopped", ("sft", "ppo"), ("evaluation",))
    leave_run(tmp_path / "b", finished=("sft", "ppo", "evaluation"))
    assert read_state(tmp_path / "b", NOW + 100).state == "finished"


def test_a_run_that_has_only_its_config_is_not_started(tmp_path: Path) -> None:
    leave_run(tmp_path, updated=None)
    assert read_state(tmp_path, NOW).state == "not started"


def test_a_second_driver_is_kept_out_of_a_run_folder(tmp_path: Path) -> None:
    with (
        occupied(tmp_path),
        pytest.raises(UsageError, match=rf"in use by another `align run` \(pid {os.getpid()} on .+\)"),
        occupied(tmp_path),
    ):
        pass
    with occupied(tmp_path):
        pass


def test_a_folder_that_cannot_be_locked_is_refused_with_what_to_choose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with (
        pytest.raises(UsageError, match=r"cannot be locked: .*No locks available; choose a run\.root"),
        occupied(tmp_path),
    ):
        pass


def test_what_a_terminal_would_obey_is_shown_harmless(tmp_path: Path) -> None:
    leave_run(tmp_path, finished=("sft",))
    state = replace(read_state(tmp_path, NOW), finished_steps=("[red]s\x1b[31mft",))
    printed = StringIO()
    Console(file=printed, width=100).print(state_view(state))
    assert "[red]s\N{REPLACEMENT CHARACTER}[31mft" in printed.getvalue()


def test_a_half_written_status_is_no_status(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text('{"stage": "pp')
    assert read_status(tmp_path) is None


def test_time_left_follows_from_the_pace_so_far_and_runs_on() -> None:
    # 2 units in 4 s are 0.5 a second; the 8 to go take 16 s, of which 3 have passed since
    status = Status("ppo", "update", 2, 10, started=NOW - 4, updated=NOW, metrics={})
    assert status.rate == 0.5
    assert status.seconds_left(NOW + 3) == 13
    assert pace(status).startswith("2.0 s each, ")


def test_the_pace_of_a_resumed_run_does_not_count_what_was_done_before(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path / "ppo", stage="ppo", resume=True)
    tracker.progress(8, 10, "update 9")
    time.sleep(0.25)
    tracker.progress(9, 10, "update 10")
    status = read_status(tmp_path)
    assert status is not None
    assert status.rate == pytest.approx(1 / (status.updated - status.started))
    assert status.updated - status.started >= 0.25


def test_there_is_no_pace_before_the_first_unit_is_done() -> None:
    assert pace(Status("ppo", "update", 0, 10, started=NOW, updated=NOW, metrics={})) == ""


@pytest.mark.parametrize(("seconds", "said"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3600, "1:00:00")])
def test_a_clock_reads_as_people_write_it(seconds: float, said: str) -> None:
    assert clock(seconds) == said


def test_a_new_command_forgets_why_the_last_one_stopped(tmp_path: Path) -> None:
    leave_run(tmp_path)
    write_end(tmp_path, "out of memory")
    with occupied(tmp_path):
        state = read_state(tmp_path, NOW)
    assert (state.state, state.error) == ("running", None)


def test_a_driver_takes_the_folder_over_from_one_that_was_killed(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("pid 7 on another-machine\n")
    ask_to_stop(tmp_path)
    with occupied(tmp_path):
        assert not is_asked_to_stop(tmp_path)
        with (
            pytest.raises(UsageError, match=rf"in use by another `align run` \(pid {os.getpid()} on "),
            occupied(tmp_path),
        ):
            pass
