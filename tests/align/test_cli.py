import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from align import __version__
from tests.align.recipe import write_recipe, write_rows

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "ray", "datasets", "transformers", "peft", "trl")


def align(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, which at its end says on stderr what heavy modules it loaded."""
    code = (
        f"import sys, atexit; sys.path.append({str(ROOT)!r}); from align.cli import main\n"
        f"atexit.register(lambda: [print('LOADED', m, file=sys.stderr) for m in {HEAVY} if m in sys.modules])\n"
        "main()"
    )
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path)


def test_check_says_what_it_looked_at_and_loads_nothing_heavy(recipe: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    finished = align("check", recipe, "base.model=owner/name")
    assert finished.returncode == 0, finished.stderr
    assert "data.reward.train" in finished.stdout
    assert "20 rows in, 20 kept" in finished.stdout
    assert "not checked" in finished.stdout
    assert finished.stderr == ""
    after = resource.getrusage(resource.RUSAGE_CHILDREN)  # CPU time: a busy machine does not count
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2


def test_check_as_json_holds_the_findings(recipe: Path) -> None:
    content = json.loads(align("check", recipe, "--json").stdout)
    assert content["ok"] is True
    assert {finding["what"]: finding["verdict"] for finding in content["findings"]} == {
        "base.model": "ok", "data.sft.train": "ok", "data.reward.train": "ok", "data.ppo.train": "ok",
    }  # fmt: skip


def test_check_says_what_the_context_of_a_base_in_a_folder_does_not_hold(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text('{"max_position_embeddings": 300}')
    (folder / "model.safetensors").touch()
    finished = align("check", recipe, f"base.model={folder}", "--json")
    found = {finding["what"]: finding for finding in json.loads(finished.stdout)["findings"]}
    assert found["lengths"]["verdict"] == "ok"
    assert "context is 300 tokens; sft.max_length is 300, not 1024" in found["lengths"]["detail"]
    finished = align("check", recipe, f"base.model={folder}", "ppo.rollout.max_response_length=300")
    assert (finished.returncode, "max_response_length: 300, but" in finished.stderr) == (2, True)


def test_check_looks_at_reward_sources_brought_heads_and_pretraining_data_too(recipe: Path) -> None:
    (recipe.parent / "mine").mkdir()
    (recipe.parent / "mine" / "adapter_config.json").write_text("{}")
    sources = "[{kind: reward}, {kind: function, function: 'nowhere_at_all:f'}]"
    ptx = ("data.ptx=nowhere.jsonl", "ppo.loss.ptx_coefficient=0.5")
    mine = f"reward.adapter={recipe.parent / 'mine'}"
    finished = align("check", recipe, "run.stages=[ppo]", mine, *ptx, f"ppo.rewards.sources={sources}")
    assert finished.returncode == 2
    for said in ("comes without its scalar head", "nowhere_at_all", "nowhere.jsonl: it does not exist"):
        assert said in finished.stderr


def test_check_finds_everything_that_is_wrong_at_once(recipe: Path) -> None:
    (recipe.parent / "prompts.jsonl").write_text("{broken\n")
    (recipe.parent / "demonstrations.jsonl").unlink()
    write_rows(recipe.parent / "comparisons.jsonl", [])
    overrides = ["base.model=./nowhere", "sft.adapter=./nothing"]
    finished = align("check", recipe, *overrides)
    assert finished.returncode == 2
    for said in ("is no folder that exists", "sft.adapter", "demonstrations.jsonl: it does not exist", "comparisons"):
        assert said in finished.stderr
    assert "prompts.jsonl" in finished.stderr
    assert "Traceback" not in finished.stderr


@pytest.mark.parametrize(
    ("model", "said"), [("tiny:mamba", "tiny:llama, tiny:gpt2"), ("gpt2", "nor a hub id"), ("embeded", "nor a hub id")]
)
def test_check_refuses_a_base_that_a_run_would(recipe: Path, model: str, said: str) -> None:
    finished = align("check", recipe, f"base.model={model}")
    assert finished.returncode == 2
    assert said in finished.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "CONFIG", "sft.epoch=1"], "did you mean sft.epochs?"),
        (["check", "CONFIG", "sft.epochs"], "write section.key=value"),
        (["run", "none.yaml"], "there is no such config file"),
        (["run", "CONFIG", "--resume", "--fresh"], "give one of them"),
        (["run", "CONFIG", "base.model=./nowhere", "--allow-change", "ppo.updates"], "resume goes on from: give both"),
        (["run", "CONFIG", "--resume", "--allow-change", "ppo.update"], "did you mean ppo.updates?"),
        (["run", "CONFIG", "--stage", "ppo", "run.stages=[sft]"], "has only sft"),
        (["run", "CONFIG", "--stage", "dpo"], "dpo"),
        (["run", "CONFIG", "base.model=./nowhere"], "nowhere"),
        (["check", "CONFIG", f"base.model=./{'n' * 300}"], "is out of reach: File name too long"),
        (["check", "CONFIG", f"data.sft.train={'n' * 300}"], "it cannot be read: File name too long"),
        (["ingest", "n" * 300, "--to", "set"], "cannot be read: File name too long"),
        (["inspect", "n" * 300], "File name too long"),
        (["inspect", "set", "--html", "."], "--html: cannot write .: it is a folder; name a file"),
        (["inspect", "set", "--html", "set/page.html"], "would damage the data set; write it elsewhere"),
        (["status", "nowhere"], "there is no run in this folder"),
        (["ingest", "x.jsonl", "--to", "set", "--system-prompt", "S"], "give --tokenizer and --max-length, too"),
        (["ingest", "x.jsonl", "--to", "set", "--address", "auto"], "give --engine ray, too"),
    ],
)
def test_a_wrong_call_is_one_message_and_exit_code_2(
    recipe: Path, in_folder: Path, arguments: list[str], said: str
) -> None:
    finished = align(*[str(recipe) if argument == "CONFIG" else argument for argument in arguments])
    assert finished.returncode == 2
    assert said in finished.stderr
    assert "Traceback" not in finished.stderr
    assert finished.stdout == "" or arguments[0] == "check"


def test_letters_that_the_terminal_does_not_have_are_replaced(recipe: Path) -> None:
    named = recipe.rename(recipe.with_name("größe-😀.yaml"))
    code = f"import sys; sys.path.append({str(ROOT)!r}); from align.cli import main; main()"
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    command = [sys.executable, "-c", code, "check", str(named)]
    finished = subprocess.run(command, capture_output=True, check=False, env=environment)
    assert finished.returncode == 0, finished.stderr
    assert "größe-?.yaml" in finished.stdout.decode("latin-1").replace("\n", "")


def test_a_full_disk_below_what_is_said_is_one_message(recipe: Path) -> None:
    with open("/dev/full", "w") as full:
        code = f"import sys; sys.path.append({str(ROOT)!r}); from align.cli import main; main()"
        command = [sys.executable, "-c", code, "check", str(recipe)]
        finished = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert finished.returncode == 1
    assert "cannot say what there is to say: [Errno 28] No space left on device" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_the_version_is_the_packages() -> None:
    assert align("--version").stdout == f"align {__version__}\n"


def test_status_says_how_far_a_run_is(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("run: {stages: [sft]}")
    now = time.time()
    status = {"stage": "sft", "doing": "training", "done": 1, "total": 3, "started": now - 10, "updated": now,
              "metrics": {"loss": 0.25}}  # fmt: skip
    (tmp_path / "status.json").write_text(json.dumps(status))
    text = align("status", tmp_path).stdout
    for shown in ("running", "training (1/3)", "left", "loss 0.25"):
        assert shown in text
    content = json.loads(align("status", tmp_path, "--json").stdout)
    assert content["status"]["metrics"] == {"loss": 0.25}
    assert 0 < content["seconds_left"] <= 20


@pytest.mark.parametrize("broken", ["stdout", "stderr", "both"])
def test_a_reader_that_is_gone_does_not_change_the_exit_code(broken: str, tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    code = (
        f"import sys; sys.path.append({str(ROOT)!r}); from align.cli import main\n"
        "sys.stdout.write('said before')\n"
        "main()"
    )
    stdout, stderr = (writing if broken in (name, "both") else subprocess.PIPE for name in ("stdout", "stderr"))
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    finished = subprocess.run(
        [sys.executable, "-c", code, "status", str(tmp_path)],
        stdout=stdout,
        stderr=stderr,
        env=buffered,
        check=False,
        text=True,
    )
    os.close(writing)
    assert finished.returncode == 2
    if broken == "stdout":
        assert finished.stderr.startswith("error: ")
        assert finished.stderr.count("\n") == 1


def test_a_run_that_does_not_run_has_no_time_left(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("run: {stages: [ppo]}")
    status = {
        "stage": "ppo",
        "doing": "update 2",
        "done": 2,
        "total": 10,
        "started": 1.0,
        "updated": 5.0,
        "metrics": {},
    }
    (tmp_path / "status.json").write_text(json.dumps(status))
    state = json.loads(align("status", tmp_path, "--json").stdout)
    assert (state["state"], state["seconds_left"]) == ("stopped", None)
