"""The base has positions for so many tokens: rows are made to fit, and the run says so."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from align.config import SFTConfig
from align.context import SFTInputs
from align.errors import ConfigError, DataError
from stages.ppo.train import run_ppo
from stages.sft.train import run_sft
from tests.resident import resident
from tests.stages.scenes import SAMPLING, context_of, demonstrations, metrics_of, ppo_config, ppo_inputs


def test_a_length_that_fits_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = resident()
    context, positions = context_of(model, tmp_path, "sft"), model.base.context_length
    assert positions is not None
    assert context.fitting_length("sft.max_length", positions) == positions
    assert context.fitting_length("sft.max_length", positions - 6, reserved=6) == positions - 6
    assert not caplog.records


def test_a_model_that_does_not_say_is_not_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = resident()
    monkeypatch.setattr(model.base.model, "config", SimpleNamespace(get_text_config=SimpleNamespace))
    assert context_of(model, tmp_path, "sft").fitting_length("sft.max_length", 10**9) == 10**9


def test_what_the_context_has_beside_a_response_is_used_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = resident()
    model.base.model.config.max_position_embeddings = 100
    context = replace(context_of(model, tmp_path, "ppo"), split=4)
    sampling = context.fitting_sampling(replace(SAMPLING, max_prompt_length=200, max_response_length=30))
    assert (sampling.max_prompt_length, sampling.batch_size) == (70, SAMPLING.batch_size // 4)
    assert "ppo.rollout.max_prompt_length is 200, more than the base's context of 100 tokens has" in caplog.text


def test_a_context_without_room_for_the_response_names_the_key(tmp_path: Path) -> None:
    model = resident()
    model.base.model.config.max_position_embeddings = 6
    with pytest.raises(ConfigError, match=r"ppo\.rollout\.max_response_length: 6, but .* context is 6 tokens"):
        context_of(model, tmp_path, "ppo").fitting_sampling(SAMPLING)


def test_prompts_longer_than_the_context_are_set_aside_in_ppo(tmp_path: Path) -> None:
    model = resident()
    model.base.model.config.max_position_embeddings = 7
    with pytest.raises(DataError, match=r"prompt over length \(\d+ tokens, over 1\)"):
        run_ppo(ppo_config(updates=1), ppo_inputs(tmp_path), context_of(model, tmp_path, "ppo"))


def test_demonstrations_longer_than_the_context_are_set_aside_in_sft(tmp_path: Path) -> None:
    model = resident()
    model.base.model.config.max_position_embeddings = 60
    rows = (*demonstrations(4), *demonstrations(1, answer="yes " * 200))
    config = SFTConfig.model_validate({"epochs": 1, "batch_size": 4, "micro_batch_size": 4, "max_length": 4000})
    context = context_of(model, tmp_path, "sft", max_reject_rate=0.5)
    result = run_sft(config, SFTInputs(rows, demonstrations(2)), context)
    assert result.account is not None
    assert result.account.num_rejected == 1
    assert len(metrics_of(tmp_path / "sft")) == 1
