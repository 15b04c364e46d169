import re
from operator import attrgetter
from pathlib import Path

import pytest

from align import settings
from align.out_of_memory import micro_batch_size, next_split, to_need_less
from tests.align.recipe import write_recipe


@pytest.mark.parametrize(
    ("size", "splits"), [(8, [2, 4, 8]), (6, [2, 6]), (9, [3, 9]), (12, [2, 4, 12]), (7, [7]), (1, [])]
)
def test_a_micro_batch_is_split_evenly_until_a_part_is_one_row(size: int, splits: list[int]) -> None:
    found, split = list[int](), next_split(size, 1)
    while split is not None:
        found.append(split)
        split = next_split(size, split)
    assert found == splits


def test_the_micro_batch_of_each_step(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    config = settings.load(
        tmp_path / "small.yaml",
        [
            *("sft.batch_size=6", "sft.micro_batch_size=3", "reward.batch_size=10", "reward.micro_batch_size=5"),
            *("ppo.loss.micro_batch_size=2", "ppo.rollout.batch_size=7"),
        ],
    )
    sizes = {step: micro_batch_size(step, config) for step in ("sft", "reward", "ppo", "evaluation")}
    assert sizes == {"sft": 3, "reward": 5, "ppo": 2, "evaluation": 7}


@pytest.mark.parametrize("step", ["sft", "reward", "ppo", "evaluation"])
def test_the_remedy_names_settings_that_there_are(step: str, tmp_path: Path) -> None:
    write_recipe(tmp_path)
    said = to_need_less(step, "align run small.yaml --resume")
    stage = "ppo" if step == "evaluation" else step
    assert stage in said
    assert said.endswith("align run small.yaml --resume --allow-change KEY")
    said = said.replace("small.yaml", "")
    named = [word.strip(",") for word in said.split() if re.match(r"[a-z]+\.[a-z]", word)]
    config = settings.load(tmp_path / "small.yaml", [])
    for word in named:
        key, _, value = word.partition("=")
        if value:
            settings.load(tmp_path / "small.yaml", [f"{key}={value}"])
        else:
            attrgetter(key)(config)
    assert any("gradient_checkpointing" in word for word in named) == (step != "evaluation")
    assert ("ppo.rollout.batch_size" in named) == (step != "sft")
