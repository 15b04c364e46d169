from dataclasses import replace
from pathlib import Path

from align import settings
from align.results import FinishedStep, Vitals
from align.summary import summarize
from tests.align.recipe import write_recipe

VITALS = Vitals(3.0, 700, None, 1, True, "float32", 100)


def test_a_runs_memory_is_its_largest_steps_and_every_step_has_its_own_seconds(tmp_path: Path) -> None:
    vitals = {
        "sft": VITALS,
        "reward": replace(VITALS, seconds=5.0, peak_rss_bytes=900, forecast_bytes=600),
        "evaluation": replace(VITALS, seconds=2.0, peak_rss_bytes=800),
    }
    finished = {name: FinishedStep({}, (), {"steps": 1}, {}, own) for name, own in vitals.items()}
    summary = summarize(settings.load(write_recipe(tmp_path)), finished, base_identity="b", total_seconds=11.0)
    assert summary["peak_rss_bytes"] == 900
    assert summary["seconds"] == {"install_excluded_total": 11.0, "sft": 3.0, "reward": 5.0, "eval": 2.0}
    assert summary["memory"] == {"reward": {"forecast_bytes": 600, "peak_bytes": 800}}  # less the imports' 100
    assert "peak_device_memory_bytes" not in summary
    on_gpu = {"sft": FinishedStep({}, (), {}, {}, replace(VITALS, peak_device_memory_bytes=40, forecast_bytes=50))}
    summary = summarize(settings.load(tmp_path / "small.yaml"), on_gpu, base_identity="b", total_seconds=3.0)
    assert summary["peak_device_memory_bytes"] == 40
    assert summary["memory"] == {"sft": {"forecast_bytes": 50, "peak_bytes": 40}}
