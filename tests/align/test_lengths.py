"""What a base's context has room for, read before anything is loaded."""

from pathlib import Path

import pytest

from align.config import Config
from align.errors import ConfigError
from align.lengths import context_length_in, fitted, fitting_length, shortened
from tests.resident import SHAPES, resident


def config(stages: tuple[str, ...] = ("sft", "reward", "ppo"), **ppo: object) -> Config:
    data = {stage: {"train": "rows.jsonl"} for stage in stages}
    return Config.model_validate(
        {
            "run": {"name": "x", "stages": stages},
            "base": {"model": "tiny:llama"},
            "data": data,
            "sft": {"max_length": 90},
            "reward": {"max_length": 200},
            "ppo": {"rollout": {"max_prompt_length": 100, "max_response_length": 30}, **ppo},
        }
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_the_context_of_a_folder_is_that_of_the_loaded_base(shape: str) -> None:
    base = resident(shape).base
    assert context_length_in(base.resolved.folder) == base.context_length == 512


def test_a_folder_that_does_not_say_has_no_limit(tmp_path: Path) -> None:
    for content, length in (
        ("{}", None), ("[]", None), ("{", None), ('{"max_position_embeddings": null}', None),
        ('{"text_config": {"max_position_embeddings": 70}}', 70),
    ):  # fmt: skip
        (tmp_path / "config.json").write_text(content)
        assert context_length_in(tmp_path) == length
    assert context_length_in(tmp_path / "missing") is None
    assert context_length_in(tmp_path / "config.json") is None  # as the embedded base's file


def test_lengths_are_shortened_to_the_context_and_told_where_a_stage_uses_them() -> None:
    before = config()
    after = fitted(before, 128)
    assert (after.sft.max_length, after.reward.max_length) == (90, 128)
    assert (after.ppo.rollout.max_prompt_length, after.ppo.loss.ptx_max_length) == (98, 128)
    said = ["reward.max_length is 128, not 200", "ppo.rollout.max_prompt_length is 98, not 100"]
    assert shortened(before, after)[:2] == said
    assert fitted(before, None) == before == fitted(before, 10**6)
    only_sft = config(("sft",))
    assert shortened(only_sft, fitted(only_sft, 128)) == []


def test_a_response_needs_a_context_with_room_for_a_prompt_where_one_is_drawn() -> None:
    with pytest.raises(ConfigError, match=r"max_response_length: 30, but the base's context is 30 tokens"):
        fitted(config(), 30)
    assert fitted(config(), 31).ppo.rollout.max_prompt_length == 1
    with pytest.raises(ConfigError, match=r"max_response_length: 30"):
        fitted(config(("reward",)), 30)
    assert fitted(config(("sft",)), 30).sft.max_length == 30
    assert fitting_length(7, 7) == 7
