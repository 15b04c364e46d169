"""What scaling concludes, that its points change one thing each, and that forgetting changes time alone."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from align import layers
from align.layers import DecoderLayers
from tests.benchmarks import ppo_update_ours, scaling_uncached
from tests.benchmarks.ppo_update_prepare import prepare
from tests.benchmarks.ppo_update_task import Job, Shape, Task
from tests.benchmarks.scaling import TOLERANCE, growth, points

SMALL = Shape(vocabulary=300, width=32, intermediate=64, layers=3, heads=4, kv_heads=2)
TASK = Task(
    updates=2, episodes=4, prompt_length=5, response_length=6, epochs=2, minibatches=1, micro_batch=2, rank=4,
    adapted_layers=1, reward_models=2,
)  # fmt: skip


def test_growth_is_one_where_time_is_linear() -> None:
    assert growth({16: 4.0, 4: 1.0, 8: 2.0}) == [1.0, 1.0]
    quadratic = growth({4: 1.0, 8: 4.0})
    assert quadratic == [2.0]
    assert max(quadratic) > TOLERANCE > max(growth({4: 3.0, 8: 4.0}))  # half of it fixed


def test_each_point_changes_one_thing() -> None:
    start = next(point for point in points() if point.axis == "depth" and point.value == Shape().layers)
    for point in points():
        changed = [
            name
            for own, first in ((point.shape, start.shape), (point.task, start.task))
            for name, value in asdict(own).items()
            if value != asdict(first)[name]
        ]
        assert len(changed) <= 1, point.title
        assert not changed or (asdict(point.task) | asdict(point.shape))[changed[0]] == point.value, point.title
    assert len({point.setting for point in points()}) == len(points()) - 5  # six axes start from one run


def test_without_the_cache_the_same_is_learnt_with_more_layers_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(tmp_path / "prepared", SMALL, TASK)
    monkeypatch.setattr(layers, "WeakIdKeyDictionary", layers.WeakIdKeyDictionary)  # put back afterwards
    found: list[list[bool]] = []
    own_hidden = DecoderLayers.hidden

    def hidden(self: DecoderLayers, ids_BS: object, *args: object, **options: object) -> object:
        found[-1].append(self._said.get(ids_BS) is not None)  # pyright: ignore[reportPrivateUsage]
        return own_hidden(self, ids_BS, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(DecoderLayers, "hidden", hidden)
    metrics: list[str] = []
    for name, main in (("cached", ppo_update_ours.main), ("not", scaling_uncached.main)):
        folder = tmp_path / name
        folder.mkdir()
        job = asdict(Job("head", "float32", str(tmp_path / "prepared"), TASK)) | {"folder": str(folder)}
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        found.append([])
        main(folder / "job.json")
        metrics.append((folder / "ppo" / "metrics.jsonl").read_text(encoding="utf-8"))
    assert metrics[0] == metrics[1]
    assert len(found[0]) == len(found[1])
    assert any(found[0])
    assert not any(found[1])
