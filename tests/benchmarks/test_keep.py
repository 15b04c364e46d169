import json
import subprocess
from pathlib import Path

import pytest

from tests.benchmarks import keep


def test_what_is_kept_says_on_which_machine_and_commit_it_was_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(keep, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(keep, "_COMMIT", "abcdef0")
    keep.keep("speed", {"ratio": 2.0})
    found = json.loads((tmp_path / "results" / "speed.json").read_text(encoding="utf-8"))
    assert json.loads(capsys.readouterr().out) == found
    assert (found["commit"], found["ratio"]) == ("abcdef0", 2.0)
    assert found["machine"]["cpu"]
    assert found["machine"]["cores"] >= 1
    assert isinstance(found["machine"]["extensions"], list)


def test_the_commit_is_that_of_the_clone_unless_its_files_are_others(tmp_path: Path) -> None:
    def git(*command: str) -> str:
        own = ["git", "-c", "user.name=N", "-c", "user.email=n@example.com", *command]
        return subprocess.run(own, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    assert keep.commit_of(tmp_path) is None
    results = tmp_path / "tests" / "benchmarks" / "results"
    results.mkdir(parents=True)
    for path in (tmp_path / "code.py", results / "speed.json"):
        path.write_text("1")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    (results / "speed.json").write_text("2")
    assert keep.commit_of(tmp_path) == git("rev-parse", "--short", "HEAD")
    (tmp_path / "code.py").write_text("2")
    assert keep.commit_of(tmp_path) == git("rev-parse", "--short", "HEAD") + "-dirty"
