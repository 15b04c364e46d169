"""What memory counts and computes, and that its layouts are one computation on more or fewer copies."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.benchmarks import memory_layout
from tests.benchmarks.memory import Layout, Measured, base_bytes, needed_bytes
from tests.benchmarks.memory_layout import Counts, Report, count, read_report, storages
from tests.benchmarks.ppo_update_prepare import prepare
from tests.benchmarks.ppo_update_task import Job, Shape, Task

TINY = Shape(vocabulary=10, width=4, intermediate=6, layers=3, heads=2, kv_heads=1)
SMALL = Shape(vocabulary=300, width=32, intermediate=64, layers=2, heads=4, kv_heads=2)
TASK = Task(updates=1, episodes=4, prompt_length=5, response_length=6, epochs=1, micro_batch=2, rank=4)


def test_needed_bytes_follow_from_the_shape() -> None:
    # 120 weights a layer and 58 of a LoRA of rank 1 (test_roofline), 10 · 4 embeddings, 7 norms of 4
    assert base_bytes(TINY) == 4 * (360 + 40 + 28)
    task = replace(TASK, rank=1)
    assert needed_bytes(Layout("head", 1), TINY, task) == 4 * (428 + 3 * 174 + 2 * 5)
    assert needed_bytes(Layout("adapter", 3), TINY, task) == 4 * (3 * 428 + 4 * 174 + 2 * 5)
    assert needed_bytes(Layout("head", 1, "bfloat16"), TINY, task) == 2 * 428 + 4 * (3 * 174 + 2 * 5)


def measured(held: int, resident: int = 0) -> Measured:
    report = Report(Counts(held - 50, 100, 50, resident, 5000), imports_bytes=1000)
    return Measured(Layout("head", 1), report, base_bytes=800, needed_bytes=1000)


def test_a_layout_may_hold_two_percent_more_than_it_needs_and_no_less() -> None:
    assert [measured(held).is_whole for held in (999, 1000, 1020, 1021)] == [False, True, True, False]


def test_half_a_base_that_no_tensor_explains_is_a_hidden_copy() -> None:
    # imports 1000, held 1000, optimizer 100
    assert [measured(1000, 2100 + hidden).is_held for hidden in (399, 400)] == [True, False]
    assert measured(1000, 2400).unexplained_bytes == 300


def test_views_and_tied_weights_count_once() -> None:
    weight = torch.zeros(10, 10)
    assert sum(storages([weight, weight[2:], weight.t(), torch.zeros(0)]).values()) == 400


def test_a_copy_beside_the_modules_is_seen() -> None:
    count()  # what other tests have left in cycles of cycles goes in two steps
    before = count()
    layer = nn.Linear(1000, 1000, bias=False)
    fused = {"corner": [layer.weight.detach().clone()]}
    after = count()
    assert after.modules - before.modules == 4_000_000
    assert after.others - before.others == 4_000_000
    del fused
    assert count().others == before.others


@pytest.mark.parametrize("copies", [1, 2, 3, 4])
def test_every_layout_learns_the_same_and_holds_what_it_says(tmp_path: Path, copies: int) -> None:
    prepare(tmp_path / "prepared", SMALL, TASK)
    before = count()
    losses: list[object] = []
    for number in dict.fromkeys((1, copies)):
        folder = tmp_path / str(number)
        folder.mkdir()
        job = asdict(Job("adapter", "float32", str(tmp_path / "prepared"), TASK)) | {"folder": str(folder)}
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        (folder / "copies.json").write_text(json.dumps(number), encoding="utf-8")
        memory_layout.main(folder / "job.json")
        losses.append((folder / "ppo" / "metrics.jsonl").read_text(encoding="utf-8"))
    assert losses[0] == losses[-1]
    counts = read_report(tmp_path / str(copies)).counts
    held = counts.modules + counts.others - before.modules - before.others
    needed = needed_bytes(Layout("adapter", copies), SMALL, TASK)
    assert needed <= held <= 1.1 * needed  # a rollout weighs something beside so small a model
