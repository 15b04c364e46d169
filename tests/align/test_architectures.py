"""Bases that are more than decoder layers over keys and values: taken as they are, or refused when loaded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3nTextConfig,
    Lfm2Config,
    Phi3Config,
    PreTrainedConfig,
)

from align.adapters import AdaptedModel
from align.errors import ModelError
from align.slots import verify_decoding
from tests.resident import SHAPES, randomize, resident

_SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def loaded(config: PreTrainedConfig, folder: Path, **adapters: Any) -> AdaptedModel:
    """Of random weights, from a folder as any other."""
    tokenizer = resident("llama").base.tokenizer
    text = config.get_text_config()
    text.vocab_size = len(tokenizer)
    config.eos_token_id = text.eos_token_id = text.pad_token_id = len(tokenizer) - 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return resident(folder, **adapters)


def with_a_tower_for_images() -> PreTrainedConfig:
    tower: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
    }
    return Gemma3Config(
        text_config={**_SMALL, "num_hidden_layers": 2, "head_dim": 8},
        vision_config={**tower, "image_size": 32, "patch_size": 8},
    )


@pytest.mark.parametrize("adapters", [{}, {"layers": 1}, {"targets": "attention"}])
def test_beside_a_tower_for_images_adapters_lie_in_the_text_decoder_and_come_back(
    adapters: dict[str, Any], tmp_path: Path
) -> None:
    model = loaded(with_a_tower_for_images(), tmp_path / "base", **adapters)
    verify_decoding(model)
    model.add("sft")
    randomize(model, "sft")
    tensors = {key: tensor.clone() for key, tensor in model.tensors("sft").items()}
    assert all(".language_model.layers." in key for key in tensors)
    assert len(tensors) == 2 * 2 * 7 // (2 if adapters.get("layers") else 1) * (4 if "targets" in adapters else 7) // 7
    (tmp_path / "adapter").mkdir()
    model.save("sft", tmp_path / "adapter")
    model.reset()
    model.load("sft", tmp_path / "adapter")
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in model.tensors("sft").items())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_base_whose_layers_all_attend_decodes(shape: str, dtype: str) -> None:
    verify_decoding(resident(shape, dtype=dtype))


def test_a_base_with_other_state_than_keys_and_values_is_refused_when_it_is_loaded(tmp_path: Path) -> None:
    config = Lfm2Config(**_SMALL, num_hidden_layers=2, layer_types=["conv", "full_attention"])
    with pytest.raises(ModelError, match="Lfm2ForCausalLM cannot decode over keys and values alone"):
        verify_decoding(loaded(config, tmp_path))


def test_a_base_that_means_something_else_behind_a_cache_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = resident("llama")
    own = type(model.trunk).forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = own(self, *args, **kwargs)
        if kwargs.get("use_cache"):
            out.last_hidden_state = out.last_hidden_state.flip(-1)
        return out

    monkeypatch.setattr(type(model.trunk), "forward", forward)
    with pytest.raises(ModelError, match="behind cached keys and values than in a whole row"):
        verify_decoding(model)


def test_where_upper_layers_take_the_keys_of_lower_ones_all_layers_run_each_time(tmp_path: Path) -> None:
    config = Gemma3nTextConfig(
        **_SMALL, num_hidden_layers=4, head_dim=8, vocab_size_per_layer_input=100, hidden_size_per_layer_input=8,
        num_kv_shared_layers=2, layer_types=["sliding_attention", "full_attention"] * 2, laurel_rank=4,
        activation_sparsity_pattern=[0.0] * 4,
    )  # fmt: skip
    config.vocab_size_per_layer_input = len(resident("llama").base.tokenizer)
    model = loaded(config, tmp_path, layers=1)
    model.add("sft")
    ids_BS = torch.arange(1, 9)[None]
    with torch.no_grad(), model.role("sft"):
        assert torch.equal(model.hidden(ids_BS), model.hidden(ids_BS))


def test_frequencies_that_are_made_anew_for_long_rows_are_no_change_of_the_base(tmp_path: Path) -> None:
    factors: dict[str, Any] = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
    }
    config = Phi3Config(
        **_SMALL, num_hidden_layers=1, max_position_embeddings=64, original_max_position_embeddings=16,
        rope_parameters={**factors, "original_max_position_embeddings": 16},
    )  # fmt: skip
    model = loaded(config, tmp_path)
    before = model.base_checksum()
    with torch.no_grad():
        model.hidden(torch.arange(1, 33)[None])
    assert model.base_checksum() == before
