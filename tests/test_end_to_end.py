"""The command on configs/tiny.yaml, in processes of its own: real stages under a real Ray. What the driver does with
stages that only pretend is in tests/align/test_driver.py, what the command says to a wrong call in test_cli.py, and
kills and stops are in tests/faults."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.shell import SECRETS, TINY, Shell, new_shell, reproducible, run_of

STEPS = ("sft", "reward", "ppo", "evaluation")

# issue 2, part 9
SUMMARY_KEYS = {
    "base": ["loads", "identity", "unchanged"],
    "sft": ["nll_before", "nll_after"],
    "reward": ["accuracy", "accuracy_ci95", "length_baseline_accuracy"],
    "ppo": ["first_step_kl", "first_minibatch_ratio_error"],
    "eval": [
        "gold_sft",
        "gold_ppo",
        "gold_gain",
        "gold_gain_ci95",
        "score_sft",
        "score_ppo",
        "kl",
        "win_rate",
        "eos_rate",
        "nll_ratio",
        "distinct2_ratio",
        "samples",
    ],
    "seconds": ["install_excluded_total", "sft", "reward", "ppo", "eval"],
}


NewShell = Callable[[str], Shell]


def run_tiny(shell: Shell, *arguments: str) -> subprocess.CompletedProcess[str]:
    finished = shell.align("run", TINY, *arguments)
    assert finished.returncode == 0, finished.stderr
    return finished


@pytest.fixture(scope="module")
def shell_in(tmp_path_factory: pytest.TempPathFactory) -> NewShell:
    cache = tmp_path_factory.getbasetemp() / "align-cache"
    return lambda name: new_shell(tmp_path_factory.mktemp(name), cache)


@pytest.fixture
def shell(shell_in: NewShell) -> Shell:
    return shell_in("shell")


@pytest.fixture(scope="module")
def whole(shell_in: NewShell) -> tuple[Shell, subprocess.CompletedProcess[str]]:
    """One command that ran all stages, and its folder, to look at."""
    shell = shell_in("whole")
    return shell, run_tiny(shell)


@pytest.fixture(scope="module")
def staged(shell_in: NewShell) -> Shell:
    """Three commands, a stage each."""
    shell = shell_in("staged")
    for stage in ("sft", "reward", "ppo"):
        run_tiny(shell, "--stage", stage)
    return shell


def summary_of(shell: Shell) -> Any:
    return json.loads((run_of(shell) / "summary.json").read_text())


def steps_said(finished: subprocess.CompletedProcess[str]) -> list[str]:
    """The lines that say what is done about each step: "sft: run (not run yet)"."""
    starts = tuple(f"{step}: {kind} (" for step in STEPS for kind in ("run", "skip", "resume"))
    return [line for line in finished.stdout.splitlines() if line.startswith(starts)]


def test_one_command_runs_all_stages_and_leaves_every_number_that_is_promised(
    whole: tuple[Shell, subprocess.CompletedProcess[str]],
) -> None:
    shell, finished = whole
    summary = summary_of(shell)
    for section, keys in SUMMARY_KEYS.items():
        assert [key for key in keys if summary[section].get(key) is None] == []
    assert summary["peak_rss_bytes"] > 100 * 2**20
    assert summary["base"]["loads"] == 1
    assert summary["base"]["unchanged"] is True
    assert summary["ppo"]["first_step_kl"] == 0.0
    assert summary["ppo"]["first_minibatch_ratio_error"] == 0.0
    assert steps_said(finished) == [f"{step}: run (not run yet)" for step in STEPS]
    for said in ("SFT: NLL per token", "reward: pair accuracy", "gold gain", "KL to the reference", "win rate"):
        assert said in finished.stdout
    assert finished.stdout.rstrip().endswith(f"results: {run_of(shell)}")
    assert finished.stderr == ""


def test_what_the_environment_keeps_secret_is_neither_written_nor_said(
    whole: tuple[Shell, subprocess.CompletedProcess[str]],
) -> None:
    shell, finished = whole
    secrets = [*SECRETS.values(), *((shell.folder / "home").rglob("auth_token"))]
    secrets = [secret.read_text().strip() if isinstance(secret, Path) else secret for secret in secrets]
    assert len(secrets) == 4  # Ray's token is the fourth
    files = {path: path.read_bytes() for path in run_of(shell).rglob("*") if path.is_file()}
    assert len(files) > 20
    for secret in secrets:
        assert [path for path, content in files.items() if secret.encode() in content] == []
        assert secret not in finished.stdout + finished.stderr


def test_the_same_command_twice_gives_the_same_bytes(
    whole: tuple[Shell, subprocess.CompletedProcess[str]], shell: Shell
) -> None:
    run_tiny(shell)
    made = reproducible(run_of(shell))
    assert made == reproducible(run_of(whole[0]))
    assert {"sft/metrics.jsonl", "reward/head/head.safetensors", "ppo/adapter/adapter_model.safetensors"} <= set(made)
    assert summary_of(shell)["eval"] == summary_of(whole[0])["eval"]


def test_stage_by_stage_gives_the_same_bytes_as_one_command(
    whole: tuple[Shell, subprocess.CompletedProcess[str]], staged: Shell
) -> None:
    assert reproducible(run_of(staged)) == reproducible(run_of(whole[0]))
    for section in ("sft", "reward", "ppo", "eval"):
        assert summary_of(staged)[section] == summary_of(whole[0])[section]


def test_run_again_a_finished_run_is_left_as_it_is_and_ray_is_not_started(staged: Shell) -> None:
    before = reproducible(run_of(staged))
    home = staged.folder / "another-home"  # Ray leaves a token in the home folder of whoever starts it
    home.mkdir()
    again = run_tiny(Shell(staged.folder, {**staged.environment, "HOME": str(home)}))
    assert steps_said(again) == [f"{step}: skip (inputs unchanged)" for step in STEPS]
    assert "gold gain" in again.stdout
    assert reproducible(run_of(staged)) == before
    assert not list(home.glob(".ray*"))


def test_artifacts_of_another_base_are_refused_and_kept(staged: Shell) -> None:
    before = reproducible(run_of(staged))
    finished = staged.align("run", TINY, "--stage", "reward", "base.model=tiny:gpt2")
    assert finished.returncode == 2
    assert "was made on base" in finished.stderr
    assert finished.stderr.count("\n") == 1
    assert reproducible(run_of(staged)) == before


@pytest.mark.parametrize(
    ("rows", "arguments", "said"),
    [
        (None, ("data.sft.train=rows.jsonl",), "rows.jsonl: it does not exist"),
        ("", ("data.sft.train=rows.jsonl",), "rows.jsonl is empty: it has no rows"),
        ('{"prompt": "p", "completion": "c"}\n{broken\n', ("data.sft.train=rows.jsonl",), "rows.jsonl:2: malformed"),
        (None, ("base.model=tiny:none",), "tiny:none is not known"),
        (None, ("base.model=nobody/nothing",), "'nobody/nothing' (revision default) is neither a local folder"),
        (None, ("--stage", "ppo"), "ppo needs the results of sft; first run: align run "),
    ],
    ids=["missing file", "empty data", "malformed line", "unknown tiny model", "unknown hub id", "before its inputs"],
)
def test_what_a_run_cannot_start_from_is_one_message_and_exit_code_2(
    shell: Shell, rows: str | None, arguments: tuple[str, ...], said: str
) -> None:
    if rows is not None:
        (shell.folder / "rows.jsonl").write_text(rows)
    finished = shell.align("run", TINY, *arguments)
    assert finished.returncode == 2
    assert said in finished.stderr
    assert finished.stderr.startswith("error: ")
    assert finished.stderr.count("\n") == 1
