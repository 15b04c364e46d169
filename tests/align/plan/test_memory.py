from dataclasses import replace
from typing import Any

import pytest
import torch

from align.config import AdaptersConfig, BaseModelConfig
from align.kernels import cpu, pointwise
from align.plan import memory
from align.plan.memory import Footprint
from align.plan.meta import read_shape
from tests.align.kernels.test_native import HAS_COMPILER
from tests.align.plan.shapes import SMALL
from tests.resident import with_adapters


def test_what_autograd_keeps_of_a_token_counted_by_hand() -> None:
    assert memory.kept_for_backward(SMALL, rank=2, dtype_bytes=4) == {
        "norms": 2 * 2 * (8 + 1) * 4,
        "adapted inputs": 2 * (8 + 8 + 8 + 16) * 4,  # of q, k and v together; of o; of gate and up together; of down
        "low ranks": 14 * 2 * 4,
        "attention": 2 * ((8 + 4 + 4) * 4 + 2 * 4),
        "mlp": 2 * 3 * 16 * 4,
    }


def test_half_precision_halves_all_but_norms_and_log_sums() -> None:
    kept = memory.kept_for_backward(SMALL, rank=2, dtype_bytes=2)
    assert kept["norms"] == 2 * 2 * 9 * 4
    assert kept["attention"] == 2 * (16 * 2 + 2 * 4)
    assert kept["mlp"] == 2 * 3 * 16 * 2


def test_with_kernels_norms_keep_their_dtype_and_gated_mlps_two_tensors() -> None:
    kept = memory.kept_for_backward(replace(SMALL, has_kernels=True), rank=2, dtype_bytes=2)
    assert kept["norms"] == 2 * 2 * (8 * 2 + 4)
    assert kept["mlp"] == 2 * 2 * 16 * 2


@pytest.mark.parametrize("has_kernels", [False, True])
@pytest.mark.parametrize(("model", "tolerance"), [("llama", 0.01), ("qwen2", 0.01), ("gpt2", 0.10)])
@pytest.mark.parametrize(("dtype", "dtype_bytes"), [("float32", 4), ("bfloat16", 2)])
def test_it_is_what_a_real_forward_pass_keeps(
    model: str, tolerance: float, dtype: str, dtype_bytes: int, has_kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if has_kernels and not (cpu.has_avx512() and HAS_COMPILER):
        pytest.skip("no AVX-512, or no C++ compiler")
    if not has_kernels:
        monkeypatch.setattr(pointwise, "form", lambda _: None)
    resident = with_adapters(model, "policy", dtype=dtype)
    own = [*resident.base.model.parameters(), *resident.base.model.buffers()]
    parameters = {tensor.untyped_storage().data_ptr() for tensor in own}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def give(tensor: Any) -> Any:
        return tensor

    with resident.role("policy", train=True), torch.autograd.graph.saved_tensors_hooks(keep, give):
        resident.hidden(torch.arange(200).view(4, 50))
    measured = sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in parameters) / 200
    shape = read_shape(BaseModelConfig(model=f"tiny:{model}"), AdaptersConfig(rank=4))
    forecast = sum(memory.kept_for_backward(shape, rank=4, dtype_bytes=dtype_bytes).values())
    assert forecast == pytest.approx(measured, rel=tolerance)


def test_checkpointing_keeps_each_layers_input_and_one_layer() -> None:
    kept = sum(memory.kept_for_backward(SMALL, rank=2, dtype_bytes=4).values())
    workspace = memory.layer_workspace(SMALL, dtype_bytes=4)
    plain = memory.training_activations(SMALL, 10, rank=2, dtype_bytes=4)
    assert plain == 10 * (kept + workspace)
    checkpointed = memory.training_activations(SMALL, 10, rank=2, dtype_bytes=4, is_checkpointed=True)
    assert checkpointed == 10 * (2 * 8 * 4 + kept // 2 + workspace)


def test_the_cache_holds_keys_and_values_of_every_layer() -> None:
    assert memory.cache_bytes(SMALL, slots=3, columns=10, dtype_bytes=2) == 2 * 2 * 3 * 10 * 4 * 2


def test_logits_are_never_of_all_tokens_at_once() -> None:
    tile = memory.logprob_logits(SMALL, memory.LOGPROB_ROWS) - memory.LOGPROB_ROWS * 8 * 4 * memory.LOGPROB_SUMS
    more = 5 * memory.LOGPROB_ROWS
    assert memory.logprob_logits(SMALL, more) == tile + more * 8 * 4 * memory.LOGPROB_SUMS


def test_a_footprints_total_is_the_sum_of_its_kinds() -> None:
    assert Footprint(weights=1, adapters=2, gradients=4, optimizer=8, cache=16).total == 31
