import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, MambaConfig, MixtralConfig, PreTrainedConfig, T5Config

from align.config import AdaptersConfig, BaseModelConfig
from align.errors import ModelError
from align.plan.meta import read_shape, shape_of
from align.plan.shape import ModelShape
from tests.resident import SHAPES, resident


def shape(config: PreTrainedConfig, **adapters: Any) -> ModelShape:
    return shape_of(config, AdaptersConfig(**adapters), auto_dtype=torch.float32)


@pytest.mark.parametrize("model", SHAPES)
@pytest.mark.parametrize("targets", ["all-linear", "attention", "mlp"])
def test_its_counts_are_those_of_the_loaded_model(model: str, targets: Any) -> None:
    real = resident(model, targets=targets, layers=1)
    read = read_shape(BaseModelConfig(model=f"tiny:{model}"), AdaptersConfig(targets=targets, layers=1))
    assert read.num_parameters == sum(p.numel() for p in real.base.model.parameters())
    real.add("sft")
    assert read.num_lora_parameters(4) == sum(t.numel() for t in real.tensors("sft").values())
    assert read.hidden_size == real.hidden_size
    everywhere = read_shape(BaseModelConfig(model=f"tiny:{model}"), AdaptersConfig(targets=targets))
    assert everywhere.with_adapters_on_last(1) == read


def test_a_folder_with_nothing_but_a_config_is_enough(tmp_path: Path) -> None:
    llama = LlamaConfig(num_hidden_layers=2, hidden_size=64, intermediate_size=128, num_attention_heads=4)
    (tmp_path / "config.json").write_text(json.dumps({**llama.to_dict(), "dtype": "bfloat16"}))
    read = read_shape(BaseModelConfig(model=str(tmp_path)), AdaptersConfig())
    assert (read.num_layers, read.mlp_width, read.is_gated, read.stored_bytes) == (2, 128, True, 2)
    assert read.num_matmul_parameters == 2 * (4 * 64 * 64 + 3 * 64 * 128)


def test_of_a_mixture_a_token_meets_the_chosen_experts() -> None:
    mixtral = MixtralConfig(
        num_hidden_layers=1, hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=4,
        num_local_experts=8, num_experts_per_tok=2, vocab_size=100,
    )  # fmt: skip
    read = shape(mixtral)
    experts, router = 3 * 32 * 64, 32 * 8
    assert read.num_matmul_parameters == 4 * 32 * 32 + 2 * experts + router
    assert read.num_parameters == 4 * 32 * 32 + 8 * experts + router + 2 * 100 * 32 + 3 * 32
    assert read.mlp_width == pytest.approx(2 * 64, abs=3)  # the router's few are counted with the experts


def test_an_8b_base_with_adapters_and_heads_takes_little_more_than_the_base() -> None:
    llama = LlamaConfig(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8,
    )  # fmt: skip
    read = shape(llama)
    assert read.num_parameters == 8_030_261_248  # as published
    assert read.num_lora_parameters(16) == 41_943_040


@pytest.mark.parametrize("config", [T5Config(), MambaConfig(num_hidden_layers=1)])
def test_what_is_no_decoder_only_transformer_is_refused(config: PreTrainedConfig) -> None:
    with pytest.raises(ModelError, match=r"base\.model"):
        shape(config)


def test_a_base_that_is_not_there_is_named() -> None:
    with pytest.raises(ModelError, match="nowhere"):
        read_shape(BaseModelConfig(model="./nowhere"), AdaptersConfig())


def test_auto_is_bfloat16_in_a_plan_for_a_gpu_made_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("align.plan.meta.auto_dtype", lambda device: torch.float32)  # a CPU without AMX
    base = BaseModelConfig(model="tiny:llama", device="cpu")
    found = [read_shape(base, AdaptersConfig(), for_gpu=for_gpu).auto_bytes for for_gpu in (False, True)]
    assert found == [4, 2]
