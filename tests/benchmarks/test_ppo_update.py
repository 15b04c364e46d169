"""What ppo-update concludes from measurements whose ratios are known, and what it gives both systems."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import cast

import pytest

from data.codec import make_codec
from data.records import Message
from data.tokenization import encode_prompt
from tests.benchmarks import ppo_update_ours
from tests.benchmarks.ppo_update_bars import Measured, Variant, Verdict, dtypes_to_measure, fastest, judge
from tests.benchmarks.ppo_update_prepare import make_prompts, make_tokenizer, prepare
from tests.benchmarks.ppo_update_task import END, Job, Report, Shape, Task, Update, read_report

SMALL = Shape(vocabulary=300, width=32, intermediate=64, layers=2, heads=4, kv_heads=2)


def measured(seconds: float, net: int = 1000) -> Measured:
    phases = Update(seconds / 4, seconds / 4, seconds / 2, seconds)
    return Measured(phases, (seconds, seconds), 16 / seconds, net + 5000, net, 3e11, 4)


def at_the_bars(**changed: Measured) -> dict[Variant, Measured]:
    """Every float32 bar just reached, and no bar of the best dtype, which is float32."""
    systems = {
        "trl": measured(100.0, 1000),
        "trl-lora": measured(80.0),
        "head": measured(50.0, 450),
        "adapter": measured(72.0, 450),
    }
    return {(system, "float32"): own for system, own in (systems | changed).items()}


def missed(everything: dict[Variant, Measured], kind: str, precision: str) -> list[Verdict]:
    return [
        verdict
        for verdict in judge(everything)
        if verdict.name.startswith(kind)
        and not verdict.is_held
        and ("best dtype" in verdict.name) == (precision == "best")
    ]


def test_ratios_at_the_bars_hold_them() -> None:
    assert missed(at_the_bars(), "episodes", "float32") == []
    assert missed(at_the_bars(), "memory", "float32") == []


@pytest.mark.parametrize(
    ("system", "changed", "kind", "count"),
    [
        ("head", measured(50.5, 450), "episodes", 2),  # 1.58 of the LoRA critic's, 1.98 of the shipped one's
        ("adapter", measured(73.0, 450), "episodes", 1),
        ("trl", measured(99.0), "episodes", 1),
        ("head", measured(50.0, 451), "memory", 1),
        ("adapter", measured(72.0, 451), "memory", 1),
        ("trl", measured(100.0, 999), "memory", 2),
    ],
)
def test_a_little_less_misses_them(system: str, changed: Measured, kind: str, count: int) -> None:
    assert len(missed(at_the_bars(**{system: changed}), kind, "float32")) == count


def test_where_float32_is_the_best_dtype_its_numbers_face_the_higher_bars_too() -> None:
    assert len(missed(at_the_bars(), "episodes", "best")) == 3
    assert len(missed(at_the_bars(), "memory", "best")) == 2
    fast = at_the_bars(head=measured(32.0, 350), adapter=measured(44.0, 350))
    assert [verdict for verdict in judge(fast) if not verdict.is_held] == []


def test_the_best_dtype_is_each_systems_own() -> None:
    both = at_the_bars() | {
        ("head", "bfloat16"): measured(20.0, 300),
        ("trl-lora", "bfloat16"): measured(90.0),  # slower than its float32
    }
    assert fastest(both, "head", "best dtype") == ("head", "bfloat16")
    assert fastest(both, "trl-lora", "best dtype") == ("trl-lora", "float32")
    verdict = next(v for v in judge(both) if v.bar == 2.5)
    assert verdict.value == pytest.approx(80 / 20)
    assert verdict.name.endswith("bfloat16 over float32")


def test_ours_is_judged_compiled_where_that_is_faster_and_the_name_says_so() -> None:
    both = at_the_bars() | {("head-compiled", "float32"): measured(40.0, 450)}
    verdict = next(v for v in judge(both) if v.bar == 1.6)
    assert verdict.value == pytest.approx(80 / 40)
    assert verdict.name.startswith("episodes/s, ours, critic: head, compiled / TRL, LoRA critic")
    slower = at_the_bars() | {("head-compiled", "float32"): measured(60.0, 450)}
    assert next(v for v in judge(slower) if v.bar == 1.6).value == pytest.approx(80 / 50)


@pytest.mark.parametrize(("rate", "dtypes"), [(60e9, ("float32",)), (430e9, ("float32", "bfloat16"))])
def test_bfloat16_is_measured_only_where_its_products_are_faster(rate: float, dtypes: tuple[str, ...]) -> None:
    assert dtypes_to_measure({"float32": 300e9, "bfloat16": rate}) == dtypes


def test_seconds_are_medians_over_all_runs_and_memory_is_the_most() -> None:
    def report(wholes: list[float], imports: int, peak: int, rate: float) -> Report:
        return Report([Update(1.0, 2.0, whole - 3.0, whole) for whole in wholes], 8, imports, peak, 2, rate)

    own = Measured.of([report([10.0, 90.0], 100, 1000, 1e9), report([12.0, 14.0], 50, 990, 3e9)], episodes=26)
    assert own.seconds == Update(1.0, 2.0, 10.0, 13.0)
    assert (own.spread, own.episodes_per_second) == ((10.0, 90.0), 2.0)
    assert (own.peak_bytes, own.net_bytes, own.matrix_rate) == (1000, 940, 3e9)


def test_every_prompt_has_as_many_tokens_as_the_task_says_on_both_sides_and_no_logit_belongs_to_eos() -> None:
    tokenizer = make_tokenizer(SMALL.vocabulary)
    codec = make_codec(tokenizer, eos_ids=[cast(int, tokenizer.eos_token_id)], system_prompt=None)
    for text in make_prompts(Task(), SMALL.vocabulary)[:4]:
        ids = cast(list[int], tokenizer(text)["input_ids"])
        assert encode_prompt(codec, [Message("user", text)]) == ids
        assert len(ids) == Task.prompt_length
        assert min(ids) > 1
        assert max(ids) < SMALL.vocabulary
    assert codec.eos_ids == (SMALL.vocabulary,)
    assert tokenizer.convert_tokens_to_ids(END) == SMALL.vocabulary


@pytest.mark.parametrize("critic", ["head", "adapter"])
def test_our_side_runs_and_reports_the_updates_after_the_first(tmp_path: Path, critic: str) -> None:
    task = Task(episodes=4, prompt_length=5, response_length=6, epochs=1, micro_batch=2, rank=4)
    prepare(tmp_path / "prepared", SMALL, task)
    job = asdict(Job(critic, "float32", str(tmp_path / "prepared"), task)) | {"folder": str(tmp_path)}
    (tmp_path / "job.json").write_text(json.dumps(job), encoding="utf-8")
    ppo_update_ours.main(tmp_path / "job.json")
    report = read_report(tmp_path)
    assert len(report.updates) == 2
    assert report.peak_bytes >= report.imports_bytes > 0
    for update in report.updates:
        assert min(update.generate, update.score, update.learn) > 0
        assert update.generate + update.score + update.learn <= update.whole
