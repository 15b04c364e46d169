"""What roofline counts on a shape whose sums can be done by hand, and what it concludes."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.benchmarks import roofline
from tests.benchmarks.ppo_update_prepare import prepare
from tests.benchmarks.ppo_update_task import Shape, Task
from tests.benchmarks.roofline import Measured, judge, measure_layout
from tests.benchmarks.roofline_flops import Counted, Rows, decode_steps

# Heads of 2 numbers: q 4·4, k and v 4·2 each, o 4·4; gate, up and down 4·6 each. A layer: 16 + 8 + 8 + 16 + 72 = 120.
TINY = Shape(vocabulary=10, width=4, intermediate=6, layers=3, heads=2, kv_heads=1)
# Of rank 1, in + out: q 8, k and v 6 each, o 8, gate, up and down 10 each. A layer: 58.
COUNTED = Counted.of(TINY, rank=1)


def test_weights_are_those_of_the_linear_layers() -> None:
    assert (COUNTED.weights, COUNTED.lora, COUNTED.head) == (3 * 120, 3 * 58, 40)
    assert (COUNTED.first_inputs, COUNTED.first_inputs_lora) == (16 + 8 + 8, 3 * 4)
    assert Counted.of(TINY, rank=3).lora == 3 * COUNTED.lora


def test_smollm2s_shape_has_its_parameters() -> None:
    counted = Counted.of(Shape(), Task.rank)
    assert counted.weights + counted.head == 134_479_872  # less the norms, 135 million
    assert counted.lora == 4_884_480


def test_a_query_sees_itself_and_what_stands_before_it() -> None:
    assert Rows(1, 3).pairs == 1 + 2 + 3
    assert Rows(2, 1, past=5).pairs == 2 * 6
    assert Rows(1, 2, past=4).pairs == 5 + 6


def test_forward_counts_two_flops_a_weight_and_token() -> None:
    # 2 rows of 3 tokens, 4 of them through the head; attention 4 · (2 · 2) a pair and layer, 2 · 6 pairs
    layers, attention, head = 2 * 3 * (120 + 58) * 6, 3 * 4 * 4 * 12, 2 * 40 * 4
    assert COUNTED.forward(Rows(2, 3), headed=4) == layers + attention + head


def test_backward_counts_no_gradient_of_frozen_weights_nor_of_the_embeddings() -> None:
    # a weight 2 and a LoRA weight 4 a token; the first layer's q, k and v (32, and 12 of their A) give nothing back
    layers = (2 * 3 * 120 + 4 * 3 * 58 - 2 * (32 + 12)) * 6
    attention, head = 2 * 3 * 4 * 4 * 12, 2 * 40 * 4
    assert COUNTED.backward(Rows(2, 3), headed=4) == layers + attention + head


def test_a_decoding_step_reads_all_weights_and_each_rows_cache() -> None:
    # keys and values: 2 · 2 numbers a layer and token; 5 tokens of 2 rows
    cache = 3 * 4 * 5 * 2
    assert COUNTED.step_bytes(Rows(2, 1, past=5), itemsize=2) == 2 * (360 + 40 + cache) + 4 * 174


def test_prefill_and_steps_together_see_what_one_pass_over_the_row_sees() -> None:
    steps = decode_steps(2, prompt=3, response=4)
    assert len(steps) == 3  # nothing is drawn from the last token
    assert Rows(2, 3).pairs + sum(rows.pairs for rows in steps) == Rows(2, 6).pairs


def learn(layers: str, dtype: str, seconds: list[float], rates: list[float]) -> Measured:
    return Measured("learn", dtype, layers, 600, seconds, rates)


def test_a_share_is_of_the_best_repeat_and_the_best_rate() -> None:
    assert learn("plain", "float32", [4.0, 2.0], [100.0, 400.0, 300.0]).share == pytest.approx(300 / 400)
    decode = Measured("decode", "float32", "plain", 600, [4.0, 2.0], [400.0], 100, (80.0, 100.0))
    assert decode.bandwidth_share == pytest.approx(50 / 100)


def test_the_faster_layout_faces_the_bar_of_its_dtype() -> None:
    slow = [learn("plain", "float32", [1.0], [1010.0]), learn("plain", "bfloat16", [1.0], [2000.0])]
    assert [(v.dtype, v.is_held) for v in judge(slow)] == [("float32", False), ("bfloat16", False)]
    both = [*slow, learn("compiled", "float32", [1.0], [1000.0]), learn("compiled", "bfloat16", [1.0], [1500.0])]
    assert [(v.layers, v.is_held) for v in judge(both)] == [("compiled", True), ("compiled", True)]
    assert [v.dtype for v in judge(slow[:1])] == ["float32"]  # what was not measured is not judged


def test_every_phase_of_a_small_model_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "REPEATS", 2)
    monkeypatch.setattr(roofline, "best_matrix_rate", lambda dtype: 1e12)
    monkeypatch.setattr(roofline, "best_memory_bandwidth", lambda: 1e12)
    shape = Shape(vocabulary=300, width=32, intermediate=64, layers=2, heads=4, kv_heads=2)
    task = Task(episodes=4, prompt_length=5, response_length=6, micro_batch=2, rank=4)
    prepare(tmp_path, shape, task)
    measured, first_passes = measure_layout(tmp_path, shape, task, dtype="float32", layers="plain")
    assert [own.phase for own in measured] == ["prefill", "decode", "score", "learn"]
    assert [own.bandwidth_share is not None for own in measured] == [False, True, False, False]
    assert all(own.share > 0 and len(own.seconds) == 2 and len(own.matrix_rates) == 3 for own in measured)
    assert first_passes > 0
    json.dumps([asdict(own) for own in measured])
