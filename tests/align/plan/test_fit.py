from dataclasses import replace

import pytest

from align.config import Config
from align.errors import UsageError
from align.plan.fit import Device, changes, parse_size
from align.plan.forecast import forecast
from tests.align.plan.shapes import SMALL
from tests.align.plan.test_forecast import config


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GB", 24 * 10**9), ("24GiB", 24 * 2**30), ("40000 MB", 4 * 10**10), ("1.5tb", 15 * 10**11), ("8kib", 8192)],
)
def test_sizes_are_decimal_or_binary_as_they_say(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["24XB", "GB", "24", "-1GB", "0GB", "1e9GB", ""])
def test_what_is_no_size_is_named(text: str) -> None:
    with pytest.raises(UsageError, match="is no size"):
        parse_size(text)


def device(of: Config, share: float) -> Device:
    """One with `share` of the bytes that a config needs."""
    return Device(SMALL, int(share * forecast(of, SMALL, on_gpu=True).peak()), gpus=1)


def test_one_change_that_is_enough_comes_with_its_forecast() -> None:
    of = config(
        stages=("ppo",), reward={"adapter": "adapter"}, ppo={"loss": {"minibatches": 1, "micro_batch_size": 16}}
    )
    small = device(of, 0.6)
    found = changes(of, small)
    by_key = {change.settings[0].partition("=")[0]: change for change in found}
    assert by_key["ppo.loss.micro_batch_size"].fits
    assert by_key["ppo.loss.micro_batch_size"].peak <= small.usable
    assert all(len(change.settings) == 1 for change in found)


def test_long_texts_beside_ppo_may_be_what_is_to_be_shorter() -> None:
    loss = {"minibatches": 8, "micro_batch_size": 2, "ptx_coefficient": 1.0, "ptx_max_length": 512}
    data = {"ppo": {"train": "rows.jsonl"}, "ptx": "rows.jsonl"}
    of = config(stages=("ppo",), data=data, reward={"adapter": "adapter"}, ppo={"loss": loss})
    keys = {setting.partition("=")[0] for change in changes(of, device(of, 0.6)) for setting in change.settings}
    assert "ppo.loss.ptx_max_length" in keys


@pytest.mark.parametrize(("of_config", "advised"), [("all", "8"), (12, "6")])
def test_adapters_on_fewer_layers_may_be_what_makes_it_fit(of_config: object, advised: str) -> None:
    shape = replace(
        SMALL, num_layers=16, adapted=tuple(replace(x, layer=n) for n in range(16) for x in SMALL.adapted[:7])
    )
    of = config(stages=("sft",), sft={"max_length": 512}, adapters={"layers": of_config, "rank": 16})
    now = shape if of_config == "all" else shape.with_adapters_on_last(12)
    small = Device(now, int(0.75 * forecast(of, now, on_gpu=True).peak()), gpus=1)
    found = {change.settings: change for change in changes(of, small)}
    change = found[(f"adapters.layers={advised}",)]
    narrowed = shape.with_adapters_on_last(int(advised))
    assert change.peak == forecast(of, narrowed, on_gpu=True).peak()
    assert change.fits


def test_the_reward_stages_answers_may_be_what_is_to_be_fewer() -> None:
    of = config(stages=("reward",), ppo={"rollout": {"batch_size": 4096, "max_response_length": 64}})
    keys = {setting.partition("=")[0] for change in changes(of, device(of, 0.3)) for setting in change.settings}
    assert {"ppo.rollout.batch_size", "ppo.rollout.max_response_length"} <= keys


def test_no_answer_is_advised_to_be_shorter_than_it_must_be() -> None:
    lengths = {"min_response_length": 100, "max_response_length": 128}
    of = config(stages=("ppo",), reward={"adapter": "adapter"}, ppo={"rollout": {"episodes": 16, **lengths}})
    found = [setting for change in changes(of, device(of, 0.01)) for setting in change.settings]
    assert "ppo.rollout.max_response_length=100" in found


def test_only_what_lowers_the_peak_is_advised() -> None:
    of = config(stages=("sft",), sft={"max_length": 512, "gradient_checkpointing": True})
    before = forecast(of, SMALL, on_gpu=True).peak()
    found = changes(of, device(of, 0.9))
    assert found
    assert all(change.peak < before for change in found)
    keys = {setting.partition("=")[0] for change in found for setting in change.settings}
    assert "sft.gradient_checkpointing" not in keys  # it is on
    assert "base.dtype" not in keys  # it is bfloat16
    assert not any(key.startswith(("ppo", "reward")) for key in keys)  # they do not run


def test_where_no_single_change_is_enough_the_last_advice_combines_no_more_than_needed() -> None:
    of = config(sft={"max_length": 512, "micro_batch_size": 4}, reward={"max_length": 512, "micro_batch_size": 4})
    small = device(of, 0.2)
    *single, together = changes(of, small)
    assert not any(change.fits for change in single)
    assert together.fits
    assert len(together.settings) > 1
    for left_out in together.settings:  # without it, it would not fit
        kept = {k: int(v) if v.isdigit() else v == "true" or v for k, v in
                (s.split("=") for s in together.settings if s != left_out)}  # fmt: skip
        assert not small.change(of, kept).fits


def test_where_nothing_is_enough_no_combination_is_given() -> None:
    of = config()
    assert not any(change.fits for change in changes(of, Device(SMALL, 100, gpus=1)))


@pytest.mark.parametrize("micro", [5, 6, 7, 12])
def test_advice_is_a_valid_config(micro: int) -> None:
    of = config(stages=("sft",), sft={"batch_size": 2 * micro, "micro_batch_size": micro})
    for change in changes(of, device(of, 0.5)):
        assert change.peak > 0


def test_what_a_combination_turns_out_not_to_need_is_left_out_of_it() -> None:
    rows = {"max_length": 128, "batch_size": 8, "micro_batch_size": 4}
    of = config(sft=rows, reward=rows)
    *_, together = changes(of, device(of, 0.3))  # on the way there gradient_checkpointing is tried, too
    assert together.settings == ("reward.micro_batch_size=1", "sft.micro_batch_size=1")
