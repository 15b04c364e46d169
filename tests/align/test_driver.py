import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import align.cluster
import align.driver
from align import settings
from align.artifacts import read_json
from align.cluster import Cluster
from align.driver import Watch, run_pipeline
from align.errors import (
    AlignError,
    ConfigError,
    DataError,
    InvariantError,
    OutOfMemoryError,
    PlacementError,
    RewardFunctionError,
    StoppedError,
    StorageError,
    UsageError,
    WorkerDiedError,
    WorkerError,
)
from align.pipeline import RunCall
from align.randomness import stage_seed
from align.show import Display, QuietDisplay, WhileSeen
from align.status import Status, read_state, read_status
from align.stopping import heard_signals
from align.worker import StageFunction, _in_sight, _vitals  # pyright: ignore[reportPrivateUsage]
from tests.align import fake_stages
from tests.align.recipe import write_recipe, write_rows
from tests.shell import hear_interrupts

COMMAND = "align run small.yaml"


class Recorder(QuietDisplay):
    """A display that remembers."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.steps: list[tuple[str, str]] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def step(self, name: str, text: str) -> None:
        self.steps.append((name, text))


def run(
    folder: Path, *overrides: str, display: Display | None = None, change: Mapping[str, StageFunction] | None = None,
    **flags: Any,
) -> dict[str, Any]:  # fmt: skip
    config = settings.load(folder / "small.yaml", [f"run.root={folder / 'runs'}", "cluster.cpus=1", *overrides])
    stages = {**fake_stages.STAGES, **(change or {})}
    return run_pipeline(config, RunCall(COMMAND, **flags), stages=stages, display=display or Recorder())


def run_of(folder: Path) -> Path:
    return folder / "runs" / "small"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_recipe(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def finished(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], Recorder]:
    """A run of all steps, to look at; tests do not change it."""
    folder, display = tmp_path_factory.mktemp("finished"), Recorder()
    write_recipe(folder)
    return folder, run(folder, display=display), display


@contextmanager
def interrupted_once(is_time: Callable[[], bool]) -> Generator[None]:
    """Ctrl-C while inside, as soon as it is time."""
    is_over = threading.Event()

    def interrupt() -> None:
        while not is_over.wait(0.05):
            if is_time():
                os.kill(os.getpid(), signal.SIGINT)
                return

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(address: str) -> bool:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(align.cluster, "connect", refuse)


def test_a_run_goes_through_all_steps_on_one_loaded_base(finished: tuple[Path, dict[str, Any], Recorder]) -> None:
    folder, summary, display = finished
    assert [name for name, _ in display.steps] == ["sft", "reward", "ppo", "evaluation"]
    assert summary["base"]["loads"] == 1
    assert summary["base"]["unchanged"] is True
    assert summary["sft"]["nll_after"] == 1.0
    assert summary["eval"]["policy"] == "ppo"
    assert set(summary["seconds"]) == {"install_excluded_total", "sft", "reward", "ppo", "eval"}
    assert summary["peak_rss_bytes"] > 50 * 2**20
    assert json.loads((run_of(folder) / "summary.json").read_text()) == summary


def test_a_run_says_of_each_step_what_memory_was_forecast_and_what_was_measured(
    finished: tuple[Path, dict[str, Any], Recorder],
) -> None:
    _, summary, _ = finished
    assert set(summary["memory"]) == {"sft", "reward", "ppo", "eval"}
    for section in summary["memory"].values():
        assert section["forecast_bytes"] > 2**20
        assert 0 < section["peak_bytes"] < summary["peak_rss_bytes"]  # less the imports


def test_a_run_writes_its_config_lineage_and_rejects(finished: tuple[Path, dict[str, Any], Recorder]) -> None:
    folder, _, display = finished
    assert settings.load(run_of(folder) / "config.yaml").ppo.updates == 4
    lineage = json.loads((run_of(folder) / "lineage.json").read_text())
    made, used = lineage["steps"]["sft"]["out"][0], lineage["steps"]["reward"]["in"]
    assert used["input.sft"] == made["sha256"]
    assert lineage["versions"]["ray"].startswith("2.")
    assert (run_of(folder) / "sft" / "rejects.jsonl").read_text() == ""
    assert "data.sft.train: 20 rows in, 20 kept" in display.notes
    assert read_state(run_of(folder), 0.0).state == "finished"


def test_the_same_run_again_skips_every_step_and_starts_no_ray(
    finished: tuple[Path, dict[str, Any], Recorder], no_ray: None
) -> None:
    folder, summary, _ = finished
    display = Recorder()
    assert run(folder, display=display) == summary
    assert [text for _, text in display.steps] == ["skip (inputs unchanged)"] * 4


def test_what_was_run_on_an_adapter_that_is_brought_is_told_beside_a_stage_that_no_longer_belongs(
    folder: Path, finished: tuple[Path, dict[str, Any], Recorder]
) -> None:
    run(folder, stage="sft")
    (folder / "brought").mkdir()
    (folder / "brought" / "adapter_config.json").write_text("another")
    display = Recorder()
    overrides = ("run.stages=[reward,ppo]", f"sft.adapter={folder / 'brought'}", "sft.learning_rate=0.1")
    summary = run(folder, *overrides, display=display)
    assert summary["run"]["steps"] == ["reward", "ppo", "evaluation"]
    assert not [note for note in display.notes if note.startswith("warning")]


def test_what_stands_by_permission_is_told(folder: Path, finished: tuple[Path, dict[str, Any], Recorder]) -> None:
    run(folder)
    run(folder, "sft.learning_rate=0.3", stage="sft")
    summary = run(folder, "sft.learning_rate=0.3", resume=True, allowed=("input.sft",), stage="reward")
    assert summary["run"]["steps"] == ["sft", "reward"]


def test_the_time_of_what_is_run_again_counts_once(
    folder: Path, finished: tuple[Path, dict[str, Any], Recorder]
) -> None:
    run(folder)
    path = run_of(folder) / "summary.json"
    earlier = {**json.loads(path.read_text())}
    earlier["seconds"] = {"install_excluded_total": 5000.0, "sft": 1000.0, "reward": 10.0, "ppo": 3000.0, "eval": 900.0}
    path.write_text(json.dumps(earlier))
    assert 1100 <= run(folder, stage="ppo", fresh=True)["seconds"]["install_excluded_total"] < 1500
    path.write_text(json.dumps(earlier))
    seconds = run(folder, "reward.epochs=2", "sft.learning_rate=1e-3", fresh=True, stage="sft")["seconds"]
    assert seconds["install_excluded_total"] < 100  # what was made from the last adapter no longer stands


def test_a_stage_is_told_what_the_config_says_of_all_data(folder: Path, ray_cluster: None) -> None:
    found = run(folder, "data.system_prompt=Be kind.", "data.max_reject_rate=0.25", stage="sft")["sft"]
    assert (found["system_prompt"], found["max_reject_rate"]) == ("Be kind.", 0.25)


def test_tensorboards_files_are_whole_when_a_stage_has_ended(folder: Path, ray_cluster: None) -> None:
    run(folder, "tracking.tensorboard=true", stage="sft")
    [events] = (run_of(folder) / "sft" / "tensorboard").iterdir()
    assert b"loss" in events.read_bytes()


def test_what_an_earlier_step_said_of_itself_is_gone_when_one_starts(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text(json.dumps(asdict(Status("ppo", "update 9", 9, 9, 0.0, 1.0, {"loss": 1.0}))))
    watch = Watch(tmp_path, QuietDisplay())
    watch.start("sft")
    status = read_status(tmp_path)
    assert status is not None
    assert (status.stage, status.doing, status.done, dict(status.metrics)) == ("sft", "starting", 0, {})


def test_a_stages_seed_is_made_from_the_runs(
    folder: Path, ray_cluster: None, finished: tuple[Path, dict[str, Any], Recorder]
) -> None:
    for stage in ("sft", "reward"):
        assert finished[1][stage]["seed"] == stage_seed(0, stage)
    assert run(folder, "run.seed=1", stage="sft")["sft"]["seed"] == stage_seed(1, "sft")


def test_stage_by_stage_ends_as_all_at_once(
    folder: Path, ray_cluster: None, finished: tuple[Path, dict[str, Any], Recorder]
) -> None:
    for stage in ("sft", "reward"):
        run(folder, stage=stage)
    summary = run(folder, stage="ppo")
    for section in ("sft", "reward", "ppo", "eval"):
        assert summary[section] == finished[1][section]
    assert summary["seconds"]["install_excluded_total"] > sum(summary["seconds"][s] for s in ("sft", "reward", "ppo"))


def test_a_changed_setting_runs_its_step_again_and_what_depends_on_it(folder: Path, ray_cluster: None) -> None:
    run(folder)
    display = Recorder()
    run(folder, "reward.epochs=2", display=display)
    assert [text.split(" ")[0] for _, text in display.steps] == ["skip", "run", "skip", "skip"]
    assert display.steps[1][1] == "run (run again: config reward.epochs changed (1.0 → 2.0))"
    display = Recorder()
    run(folder, "reward.epochs=2", "sft.learning_rate=0.1", display=display)
    assert [text.split(" ")[0] for _, text in display.steps] == ["run", "run", "run", "run"]
    assert "its input changed (input.sft)" in display.steps[1][1]


def test_a_stage_alone_warns_of_settings_that_the_earlier_ones_were_not_run_with(
    folder: Path, ray_cluster: None
) -> None:
    run(folder, stage="sft")
    display = Recorder()
    run(folder, "sft.learning_rate=0.1", stage="reward", display=display)
    (warning,) = [note for note in display.notes if note.startswith("warning")]
    assert "sft stands as it was run before, though since then config sft.learning_rate changed" in warning
    run(folder, stage="reward", display=(quiet := Recorder()))
    assert not [note for note in quiet.notes if note.startswith("warning")]


def test_a_refused_command_leaves_the_config_of_what_is_there(
    finished: tuple[Path, dict[str, Any], Recorder], no_ray: None
) -> None:
    folder = finished[0]
    before = (run_of(folder) / "config.yaml").read_text()
    with pytest.raises(AlignError, match="base"):
        run(folder, "base.model=tiny:gpt2", stage="reward")
    for section in ("sft", "reward"):
        with pytest.raises(UsageError, match=rf"--resume refused, {section}: config {section}\.epochs changed"):
            run(folder, f"{section}.epochs=7", resume=True)
    assert (run_of(folder) / "config.yaml").read_text() == before


def test_a_refused_command_leaves_the_rejects_of_what_is_there(folder: Path, ray_cluster: None) -> None:
    path = folder / "prompts.jsonl"
    path.write_text(path.read_text() + '{"question": "Hello?"}\n')
    run(folder, "data.max_reject_rate=0.5")
    rejects = (run_of(folder) / "ppo" / "rejects.jsonl").read_text()
    assert "prompts.jsonl:21" in rejects
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(UsageError, match=r"the rows of data\.ppo\.train changed"):
        run(folder, "data.max_reject_rate=0.5", resume=True)
    assert (run_of(folder) / "ppo" / "rejects.jsonl").read_text() == rejects
    run(folder, "data.max_reject_rate=0.5")
    assert (run_of(folder) / "ppo" / "rejects.jsonl").read_text() == ""


def test_the_time_of_a_resumed_step_holds_what_was_kept_of_the_stopped_one(folder: Path, ray_cluster: None) -> None:
    with pytest.raises(WorkerError):
        run(folder, "cluster.max_failures=0", change={"ppo": fake_stages.stopping_half_way})
    seconds = run(folder, resume=True)["seconds"]
    assert seconds["ppo"] > 1000
    assert seconds["install_excluded_total"] > 1000


def test_a_run_folder_that_vanishes_is_one_error_that_names_it(folder: Path, ray_cluster: None) -> None:
    with pytest.raises(StorageError, match=r"cannot write .*/sft/metrics\.jsonl"):
        run(folder, stage="sft", change={"sft": fake_stages.losing_the_run_folder})
    assert not run_of(folder).exists()


def test_a_run_folder_moved_elsewhere_goes_on_there(folder: Path, ray_cluster: None) -> None:
    with pytest.raises(WorkerError):
        run(folder, "cluster.max_failures=0", change={"ppo": fake_stages.stopping_half_way})
    elsewhere = folder / "elsewhere"
    (folder / "runs").rename(elsewhere)
    assert run(folder, f"run.root={elsewhere}", resume=True)["ppo"] == {"first_update": 2}
    assert not (folder / "runs").exists()
    lineage = read_json(elsewhere / run_of(folder).name / "lineage.json")
    assert str(folder / "runs") not in json.dumps(lineage)


def test_a_stage_before_its_inputs_is_refused_without_ray(folder: Path, no_ray: None) -> None:
    with pytest.raises(UsageError, match=f"first run: {COMMAND} --stage sft"):
        run(folder, stage="reward")


def test_an_error_of_ours_in_the_worker_arrives_as_itself(folder: Path, ray_cluster: None) -> None:
    with pytest.raises(InvariantError, match=r"^the ratio is 3$"):
        run(folder, stage="sft", change={"sft": fake_stages.failing_invariant})
    assert read_state(run_of(folder), 0.0).error == "the ratio is 3"
    assert settings.load(run_of(folder) / "config.yaml").run.name == "small"  # with what it was started


def test_a_failure_of_a_reward_function_is_told_with_where_its_traceback_is(folder: Path, ray_cluster: None) -> None:
    saved = run_of(folder) / "error.txt"
    with pytest.raises(RewardFunctionError, match=re.escape(f"mine:score raised KeyError (traceback: {saved})")):
        run(folder, stage="sft", change={"sft": fake_stages.with_a_failing_reward_function})
    assert "KeyError: 'colour'" in saved.read_text()


def test_any_other_error_is_told_with_its_type_and_where_its_traceback_is(folder: Path, ray_cluster: None) -> None:
    with pytest.raises(WorkerError, match=r"sft failed in the worker: LookupError: no such luck.*--resume") as raised:
        run(folder, stage="sft", change={"sft": fake_stages.failing_somehow})
    saved = run_of(folder) / "error.txt"
    assert str(saved) in str(raised.value)
    assert "failing_somehow" in saved.read_text()


def test_the_death_of_the_worker_is_told_with_its_cause_and_how_to_go_on(folder: Path, ray_cluster: None) -> None:
    with pytest.raises(WorkerError, match=rf"the worker died \(sft\): .*exit.*{COMMAND} --stage sft --resume"):
        run(folder, "cluster.max_failures=0", stage="sft", change={"sft": fake_stages.dying})


def test_a_worker_that_dies_is_started_anew_and_goes_on(folder: Path, ray_cluster: None) -> None:
    summary = run(folder, change={"ppo": fake_stages.dying_once}, display=(seen := Recorder()))
    assert summary["ppo"] == {"first_update": 2}
    assert summary["seconds"]["ppo"] > 1000 > summary["seconds"]["install_excluded_total"]  # whose clock went on
    (warning,) = [note for note in seen.notes if note.startswith("warning: the worker died (ppo)")]
    assert "Its last words: no more room for checkpoint (" in warning
    assert warning.endswith("a new one (1 of cluster.max_failures 2), and goes on after update 2")


def test_a_step_that_runs_out_of_memory_is_done_again_in_smaller_parts(folder: Path, ray_cluster: None) -> None:
    without = partial(fake_stages.without_memory_for, 2)
    summary = run(folder, "ppo.loss.micro_batch_size=2", change={"ppo": without}, display=(seen := Recorder()))
    assert summary["ppo"] == {"first_update": 2, "split": 2}
    (warning,) = [note for note in seen.notes if note.startswith("warning: out of memory in ppo")]
    assert "you tried to allocate" in warning
    assert warning.endswith("a new worker computes 1 of a micro-batch's 2 rows at a time, and goes on after update 2")


def test_what_ran_out_of_memory_is_resumed_in_the_parts_that_fitted(folder: Path, ray_cluster: None) -> None:
    change = {"ppo": fake_stages.stopping_in_parts}
    with pytest.raises(WorkerError):
        run(folder, "ppo.loss.micro_batch_size=2", "cluster.max_failures=0", change=change)
    change = {"ppo": partial(fake_stages.without_memory_for, 2)}
    summary = run(folder, "ppo.loss.micro_batch_size=2", change=change, resume=True, display=(seen := Recorder()))
    assert summary["ppo"] == {"first_update": 2, "split": 2}
    assert not [note for note in seen.notes if "out of memory" in note]


def test_memory_that_does_not_suffice_for_one_row_ends_the_run_with_what_to_change(
    folder: Path, ray_cluster: None
) -> None:
    with pytest.raises(OutOfMemoryError, match=r"One row at a time .*ppo\.loss\.gradient_checkpointing=true") as raised:
        run(folder, "ppo.loss.micro_batch_size=2", change={"ppo": partial(fake_stages.without_memory_for, 1)})
    assert raised.value.exit_code == 1


def test_a_worker_that_dies_again_and_again_ends_the_run(folder: Path, ray_cluster: None) -> None:
    seen = Recorder()
    with pytest.raises(WorkerDiedError, match=rf"the worker died \(sft\): .*{COMMAND} --stage sft --resume"):
        run(
            folder,
            "cluster.max_failures=1",
            stage="sft",
            change={"sft": fake_stages.dying},
            display=seen,
        )
    assert ["goes on from the step's beginning" in note for note in seen.notes if "died" in note] == [True]


def test_a_stage_that_changes_the_base_goes_red(folder: Path, ray_cluster: None) -> None:
    with pytest.raises(InvariantError, match="sft changed the base model"):
        run(folder, stage="sft", change={"sft": fake_stages.touching_the_base})
    assert not (run_of(folder) / "sft" / "result.json").exists()


def test_a_stopped_ppo_is_resumed_or_discarded_as_asked_and_goes_on_in_a_job(
    folder: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(folder, stage="sft")
    run(folder, stage="reward")
    with pytest.raises(WorkerError):
        run(folder, "cluster.max_failures=0", change={"ppo": fake_stages.stopping_half_way})
    with pytest.raises(UsageError, match=rf"unfinished ppo .*: {COMMAND} --resume; .*{COMMAND} --stage ppo --fresh"):
        run(folder)
    with pytest.raises(UsageError, match=rf"unfinished ppo .*: {COMMAND} --stage ppo --resume; "):
        run(folder, stage="ppo")
    with pytest.raises(UsageError, match=r"ppo\.updates changed"):
        run(folder, "ppo.updates=8", resume=True)
    with monkeypatch.context() as patch:
        patch.setattr(align.driver, "is_in_ray_job", lambda: True)
        assert run(folder)["ppo"] == {"first_update": 2}
    assert run(folder, stage="ppo", fresh=True)["ppo"] == {"first_update": 0}


def test_an_unfinished_stage_is_discarded_by_a_fresh_run_of_all(folder: Path, ray_cluster: None) -> None:
    with pytest.raises(WorkerError):
        run(folder, "cluster.max_failures=0", change={"ppo": fake_stages.stopping_half_way})
    assert run(folder, fresh=True)["ppo"] == {"first_update": 0}


def test_a_run_done_again_that_was_stopped_goes_on_to_its_end(folder: Path, ray_cluster: None) -> None:
    run(folder)
    changed = ("sft.learning_rate=0.1", "reward.epochs=2", "ppo.updates=7")
    with pytest.raises(WorkerError):
        run(folder, *changed, "cluster.max_failures=0", change={"reward": fake_stages.failing_somehow})
    assert read_state(run_of(folder), 0.0).steps_to_go == ("reward", "ppo", "evaluation")
    half, first, last = {"ppo": fake_stages.stopping_half_way}, Recorder(), Recorder()
    with pytest.raises(WorkerError):
        run(folder, *changed, "cluster.max_failures=0", change=half, resume=True, display=first)
    assert [text.split(" ")[0] for _, text in first.steps] == ["skip", "run", "run"]
    summary = run(folder, *changed, resume=True, display=last)
    assert [text.split(" ")[0] for _, text in last.steps] == ["skip", "skip", "resume", "run"]
    assert "its input changed (input.policy)" in last.steps[3][1]
    assert summary["run"]["steps"] == ["sft", "reward", "ppo", "evaluation"]


def test_a_changed_evaluation_is_not_a_reason_to_train_again(folder: Path, ray_cluster: None) -> None:
    run(folder)
    with pytest.raises(UsageError, match=rf"refused, evaluation: .*run it again: {COMMAND}$"):
        run(folder, "evaluation.samples=8", resume=True)
    run(folder, "evaluation.samples=8", display=(seen := Recorder()))
    assert [text.split(" ")[0] for _, text in seen.steps] == ["skip", "skip", "skip", "run"]


_TIDYING_UP = """
import sys, time
from align.stopping import heard_signals
with heard_signals(lambda why: print(why, flush=True)):
    try:
        print("up", flush=True)
        time.sleep(600)
    finally:
        print("tidying up", flush=True)
        time.sleep(float(sys.argv[1]))
        print("tidy", flush=True)
"""


def signalled_twice(number: signal.Signals, *, seconds_to_tidy_up: float) -> tuple[str, int]:
    """At work, and then while it tidies up; what is said after that, and the exit code."""
    command = [sys.executable, "-c", _TIDYING_UP, str(seconds_to_tidy_up)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=hear_interrupts) as process:
        assert process.stdout is not None
        for said in ("up", "tidying up"):
            assert process.stdout.readline().strip() == said
            process.send_signal(number)
        code = process.wait(timeout=60)
        return process.stdout.read().strip(), code


def test_signals_are_heard_as_before_once_it_is_over() -> None:
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    with heard_signals():
        assert all(signal.getsignal(n) is not handler for n, handler in zip(numbers, before, strict=True))
    assert [signal.getsignal(number) for number in numbers] == before


def test_a_second_interrupt_ends_at_once_whatever_the_first_is_still_tidying_up() -> None:
    assert signalled_twice(signal.SIGINT, seconds_to_tidy_up=600) == ("ended at once by a second Ctrl-C", 130)


def test_a_second_sigterm_does_not_break_off_the_good_order() -> None:
    assert signalled_twice(signal.SIGTERM, seconds_to_tidy_up=2) == ("tidy", 143)


@pytest.mark.parametrize("where", ["inside", "at exit"])
def test_where_ray_no_longer_answers_the_process_ends_all_the_same(where: str) -> None:
    code = f"""
import atexit, os, signal, time
import align.stopping
align.stopping._LAST_SECONDS = 0.5
if {where == "at exit"}:
    atexit.register(time.sleep, 600)
with align.stopping.heard_signals(lambda why: print(why, flush=True)):
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(600)
    finally:
        time.sleep(600 * {where == "inside"})
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == 143
    assert ended.stdout == ("ended without Ray, which does not answer\n" if where == "inside" else "")


def test_what_a_stage_ends_with_as_the_run_is_stopped_is_kept(folder: Path, ray_cluster: None) -> None:
    display = Recorder()
    change = {"reward": fake_stages.ending_once_asked_to_stop}
    with interrupted_once((run_of(folder) / "reward" / "waiting").exists), pytest.raises(StoppedError):
        run(folder, display=display, change=change)
    assert any(note.startswith("stopping: reward has up to 5 s") for note in display.notes)
    assert (run_of(folder) / "reward" / "result.json").exists()
    assert not (run_of(folder) / "ppo" / "started.json").exists()
    assert not (run_of(folder) / ".stop").exists()


def test_a_stage_that_does_not_stop_is_ended(folder: Path, ray_cluster: None) -> None:
    change, display = {"reward": fake_stages.deaf}, Recorder()
    with interrupted_once((run_of(folder) / "reward" / "waiting").exists), pytest.raises(StoppedError):
        run(folder, change=change, display=display)
    assert display.notes[-1].startswith("warning: reward did not come to a place to stop at")
    assert not (run_of(folder) / "reward" / "result.json").exists()
    assert [path.name for path in run_of(folder).glob("**/.*.tmp")] == []


def test_a_stage_that_fails_as_it_is_stopped_is_told_of(folder: Path, ray_cluster: None) -> None:
    display = Recorder()
    change = {"reward": fake_stages.failing_once_asked_to_stop}
    with interrupted_once((run_of(folder) / "reward" / "waiting").exists), pytest.raises(StoppedError):
        run(folder, display=display, change=change)
    assert any("warning: reward failed as it was stopped: no room" in note for note in display.notes)


def test_a_reader_that_is_gone_does_not_keep_a_stage_from_being_asked_to_stop(folder: Path, ray_cluster: None) -> None:
    class Gone(QuietDisplay):
        def note(self, text: str) -> None:
            if text.startswith("stopping"):
                raise BrokenPipeError

    change = {"reward": fake_stages.ending_once_asked_to_stop}
    with interrupted_once((run_of(folder) / "reward" / "waiting").exists), pytest.raises(StoppedError):
        run(folder, display=WhileSeen(Gone()), change=change)
    assert (run_of(folder) / "reward" / "result.json").exists()


def test_a_worker_that_dies_while_it_loads_is_started_anew(
    folder: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, display = Cluster.start, Recorder()
    deaths = 1

    def start(cluster: Cluster) -> None:
        nonlocal deaths
        own(cluster)
        if deaths:
            deaths -= 1
            raise WorkerDiedError("the worker died (loading the base model)")

    monkeypatch.setattr(Cluster, "start", start)
    run(folder, stage="sft", display=display)
    assert (
        "(loading the base model); a new one (1 of cluster.max_failures 2), and goes on from the" in display.notes[-1]
    )


def test_the_way_to_go_on_names_the_changes_that_were_allowed(folder: Path, ray_cluster: None) -> None:
    with pytest.raises(WorkerError):
        run(folder, change={"ppo": fake_stages.failing_somehow})
    with pytest.raises(WorkerError, match=f"{COMMAND} --resume --allow-change ppo.updates$"):
        run(
            folder,
            "ppo.updates=8",
            resume=True,
            allowed=("ppo.updates",),
            change={"ppo": fake_stages.failing_somehow},
        )


def test_a_worker_without_a_gpu_of_its_own_sees_none(
    folder: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = run(folder, "cluster.gpus=0", stage="sft", change={"sft": fake_stages.telling_what_gpus_it_sees})
    assert summary["sft"]["sees"] == ""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)  # what others have says nothing of this run's memory
    assert _vitals(1.0, "float32", 0, is_on_gpu=False).peak_device_memory_bytes is None


@pytest.mark.parametrize(
    ("devices", "is_wanted", "seen"),
    [(None, True, "0"), ("2,3", True, "2"), ("GPU-7f", True, "GPU-7f"), ("", True, ""), ("0,1", False, "")],
)
def test_a_worker_sees_one_gpu_at_most(devices: str | None, is_wanted: bool, seen: str) -> None:
    assert _in_sight(devices, is_wanted=is_wanted) == seen


def test_what_ray_cannot_place_is_said(folder: Path, ray_cluster: None) -> None:
    with pytest.raises(PlacementError, match=r"Asked for: 64 CPUs.*a node with 2 CPUs.*cluster\.cpus=2"):
        run(folder, "cluster.cpus=64", "cluster.placement_timeout_seconds=0.5")


def test_what_cannot_be_placed_deletes_nothing(folder: Path, ray_cluster: None) -> None:
    run(folder, stage="sft")
    with pytest.raises(PlacementError):
        run(folder, "cluster.cpus=64", "cluster.placement_timeout_seconds=0.5", stage="sft", fresh=True)
    assert (run_of(folder) / "sft" / "result.json").exists()


def test_ctrl_c_says_how_to_go_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(address: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(align.cluster, "connect", interrupt)
    with pytest.raises(StoppedError, match=f"{COMMAND} --resume") as raised:
        run(folder)
    assert raised.value.exit_code == 130
    assert read_state(run_of(folder), 0.0).state == "stopped"


def test_a_relative_root_is_refused_in_a_ray_job(in_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_recipe(in_folder)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(UsageError, match=r"run\.root is 'runs', relative.*run\.root=/absolute/path"):
        run(in_folder, "run.root=runs")
    assert not (in_folder / "runs").exists()


def test_too_many_rejected_rows_stop_the_run_before_ray_and_are_in_a_file(folder: Path, no_ray: None) -> None:
    write_rows(folder / "prompts.jsonl", [{"prompt": "Hello?"}, {"question": "Hello?"}])
    with pytest.raises(DataError, match=r"data\.ppo\.train: 2 rows in, 1 kept, 1 rejected"):
        run(folder)
    assert "prompts.jsonl:2" in (run_of(folder) / "ppo" / "rejects.jsonl").read_text()


def test_a_response_that_leaves_a_prompt_no_room_is_told_before_anything_runs(folder: Path, no_ray: None) -> None:
    with pytest.raises(ConfigError, match="max_response_length: 512, but the base's context is 512 tokens"):
        run(folder, "ppo.rollout.max_response_length=512")


def test_a_reward_function_that_was_edited_runs_ppo_again_and_nothing_before_it(
    folder: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, display = folder / "my_own_scoring.py", Recorder()
    monkeypatch.syspath_prepend(folder)
    sources = "ppo.rewards.sources=[{kind: function, function: 'my_own_scoring:score'}]"
    module.write_text("def score(prompt, response):\n    return 1.0\n")
    run(folder, sources)
    module.write_text("def score(prompt, response):\n    return 2.0\n")
    run(folder, sources, display=display)
    assert [text.partition(" ")[0] for _, text in display.steps] == ["skip", "skip", "run", "run"]
    assert display.steps[2] == ("ppo", "run (run again: its input changed (input.source.function))")


def test_a_reward_function_that_is_nowhere_is_told_before_anything_runs(folder: Path, no_ray: None) -> None:
    with pytest.raises(ConfigError, match="there is no module nowhere_at_all"):
        run(folder, 'ppo.rewards.sources=[{kind: function, function: "nowhere_at_all:f"}]')
    assert not (run_of(folder) / "config.yaml").exists()


def test_held_out_prompts_that_are_trained_on_are_warned_of(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(address: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(align.cluster, "connect", stop)
    display = Recorder()
    with pytest.raises(StoppedError):
        run(folder, f"data.ppo.held_out={folder / 'prompts.jsonl'}", display=display)
    assert any(note.startswith("warning: 20 held-out prompts of data.ppo also occur") for note in display.notes)


def test_a_run_root_that_cannot_be_written_is_refused(folder: Path) -> None:
    (folder / "runs").write_text("a file")
    with pytest.raises(UsageError, match="cannot write into the run folder"):
        run(folder)


def test_the_tests_use_no_left_over_cluster() -> None:
    assert "RAY_ADDRESS" not in os.environ
