from pathlib import Path

import pytest

from align import settings
from align.check import check_config
from align.config import Config
from align.intake import kind_of, read_stage_data
from data.records import Verdict
from tests.align.recipe import write_recipe, write_rows


def loaded(folder: Path, *overrides: str) -> Config:
    return settings.load(write_recipe(folder), overrides)


def test_reward_data_are_verdicts_where_the_objective_is_unpaired(tmp_path: Path) -> None:
    config = loaded(tmp_path)
    assert [kind_of(config, stage) for stage in config.run.stages] == ["demonstration", "comparison", "prompt"]
    assert kind_of(loaded(tmp_path, "reward.objective.kind=rao-kupper"), "reward") == "comparison"
    assert kind_of(loaded(tmp_path, "reward.objective.kind=unpaired"), "reward") == "verdict"


def test_verdicts_are_read_and_split_by_prompt(tmp_path: Path) -> None:
    config = loaded(tmp_path, "reward.objective.kind=unpaired")
    rows = [{"prompt": f"Is {i} a number?", "completion": "Yes.", "label": i % 2 == 0} for i in range(20)]
    write_rows(tmp_path / "comparisons.jsonl", rows)
    notes: list[str] = []
    data = read_stage_data(config, "reward", tmp_path / "run", note=notes.append)
    held_out = f"data.reward: {len(data.held_out)} of them are held out, by prompt (held_out_fraction 0.3)"
    assert notes == ["data.reward.train: 20 rows in, 20 kept", held_out]
    assert {type(record) for record in (*data.train, *data.held_out)} == {Verdict}
    assert len(data.train) + len(data.held_out) == 20


@pytest.mark.parametrize(("kind", "verdict"), [("bradley-terry", "ok"), ("unpaired", "wrong")])
def test_a_check_reads_the_first_rows_as_the_objective_needs_them(tmp_path: Path, kind: str, verdict: str) -> None:
    findings = check_config(loaded(tmp_path, f"reward.objective.kind={kind}"))
    [finding] = [finding for finding in findings if finding.what == "data.reward.train"]
    assert finding.verdict == verdict
    if kind == "unpaired":
        assert "Known formats of a verdict: prompt + completion + label" in finding.detail
