import json
import re
from pathlib import Path

import pytest

from tests.benchmarks import keep


def test_what_is_kept_says_on_which_machine_and_commit_it_was_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(keep, "RESULTS", tmp_path / "results")
    keep.keep("speed", {"ratio": 2.0})
    found = json.loads((tmp_path / "results" / "speed.json").read_text(encoding="utf-8"))
    assert json.loads(capsys.readouterr().out) == found
    assert found["ratio"] == 2.0
    assert found["machine"]["cpu"]
    assert found["machine"]["cores"] >= 1
    assert isinstance(found["machine"]["extensions"], list)
    assert found["commit"] is None or re.fullmatch(r"[0-9a-f]{7,}", found["commit"])
