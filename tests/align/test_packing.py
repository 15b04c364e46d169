"""Rows packed into their distinct tokens: the same numbers, from fewer tokens."""

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from align import packing
from align.adapters import AdaptedModel
from align.config import AdaptersConfig
from align.context import Sampling
from align.generation import generate
from align.heads import ScalarHead
from align.kernels import row_attention
from align.packing import PackedRows, longest_packed
from stages.reward.batches import Collator, TrainerRow, batch_scores
from tests.resident import SHAPES, count_tokens, distance, resident, save_wide_llama, with_adapters

ROWS = torch.tensor([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 7, 0], [1, 2, 3, 9, 8, 7], [1, 2, 3, 9, 0, 0]])
IS_TOKEN = ROWS > 0
NUM_DISTINCT = 3 + 3 + 1 + 3


def unpacked(model: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.packings, "longest", 0)


def packing_of(ids_BL: Tensor, is_token_BL: Tensor) -> PackedRows:
    packing = PackedRows.of(ids_BL, is_token_BL)
    assert packing is not None
    return packing


# ---- how the rows stand ----


def test_tokens_that_follow_the_same_tokens_stand_once_and_padding_not_at_all() -> None:
    packing = packing_of(ROWS, IS_TOKEN)
    assert packing.pack(ROWS).tolist() == [[1, 2, 3, 4, 5, 6, 7, 9, 8, 7]]
    assert packing.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 4, 3, 4, 5]]
    rows = packing.unpack(packing.pack(ROWS))
    assert torch.equal(rows[IS_TOKEN], ROWS[IS_TOKEN])
    by_head = torch.stack([packing.pack(ROWS), 10 * packing.pack(ROWS)], dim=1)  # (1, heads, N)
    assert torch.equal(packing.unpack(by_head, dim=2), torch.stack([rows, 10 * rows], dim=1))


def test_equal_tokens_behind_others_are_not_the_same() -> None:
    rows = torch.tensor([[1, 2, 5, 5], [1, 3, 5, 5], [1, 2, 5, 6], [1, 2, 5, 5]])
    packing = packing_of(rows, torch.ones_like(rows, dtype=torch.bool))
    assert packing.pack(rows).tolist() == [[1, 2, 5, 5, 3, 5, 5, 6]]


def test_a_token_that_is_also_the_padding_is_kept() -> None:
    rows, is_token = torch.tensor([[1, 0, 0], [1, 0, 0]]), torch.tensor([[True, True, False], [True, True, True]])
    assert packing_of(rows, is_token).pack(rows).tolist() == [[1, 0, 0]]


def test_a_gradient_of_what_stands_once_is_the_sum_over_the_rows() -> None:
    packing = packing_of(ROWS, IS_TOKEN)
    packed = torch.zeros(1, NUM_DISTINCT, requires_grad=True)
    weights = torch.arange(24.0).view(4, 6)
    (packing.unpack(packed) * weights * IS_TOKEN).sum().backward()
    assert packed.grad is not None
    expected = [0 + 6 + 12 + 18, 1 + 7 + 13 + 19, 2 + 8 + 14 + 20, 3 + 9, 4, 5, 10, 15 + 21, 16, 17]
    assert packed.grad.tolist() == [expected]
    rows = torch.zeros(4, 6, requires_grad=True)
    (packing.pack(rows) * torch.arange(10.0)).sum().backward()
    assert rows.grad is not None
    assert rows.grad.tolist() == [[0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 6, 0], [0, 0, 0, 7, 8, 9], [0] * 6]


@pytest.mark.parametrize("dim", [1, 2])
def test_both_ways_have_the_gradients_of_finite_differences(dim: int) -> None:
    packing = packing_of(ROWS, IS_TOKEN)
    shape = (1, NUM_DISTINCT, 2) if dim == 1 else (1, 2, NUM_DISTINCT, 3)
    packed = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    keep = IS_TOKEN.view(4, 6, 1) if dim == 1 else IS_TOKEN.view(4, 1, 6, 1)
    assert torch.autograd.gradcheck(lambda x: packing.unpack(x, dim=dim) * keep, (packed,))
    rows = torch.randn(4, 6, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(packing.pack, (rows,))


def test_nothing_is_packed_where_little_would_be_saved() -> None:
    def of(ids_BL: Tensor, is_token_BL: Tensor | None = None) -> PackedRows | None:
        return PackedRows.of(ids_BL, torch.ones_like(ids_BL, dtype=torch.bool) if is_token_BL is None else is_token_BL)

    assert of(ROWS[:1]) is None
    begins_alike = torch.cat([torch.ones(2, 2, dtype=torch.int64), torch.arange(2, 16).view(2, 7)], dim=1)
    assert of(begins_alike) is None  # 16 of 18
    begins_alike[1, 2] = begins_alike[0, 2]
    assert of(begins_alike) is not None  # 15 of 18
    distinct = torch.arange(16).view(2, 8)
    assert of(distinct, distinct < 14) is not None  # 14 of 16
    assert of(distinct, distinct < 15) is None


def test_what_stays_packed_is_packed_whatever_is_saved() -> None:
    ids_BL = torch.arange(16).view(2, 8)
    packing = PackedRows.of(ids_BL, torch.ones_like(ids_BL, dtype=torch.bool), stay_packed=True)
    assert packing is not None
    assert packing.pack(ids_BL).tolist() == [list(range(16))]


# ---- the same numbers ----


def learnt(model: AdaptedModel, *, is_checkpointed: bool = False) -> tuple[Tensor, list[Tensor]]:
    head = ScalarHead(model.hidden_size).initialize(1)
    with model.role("policy", train=True):
        hidden_BSH = model.hidden(ROWS.clone(), IS_TOKEN, is_checkpointed=is_checkpointed)
        loss = head(hidden_BSH)[IS_TOKEN].square().sum()
        gradients = torch.autograd.grad(loss, list(model.tensors("policy").values()))
    return hidden_BSH.detach()[IS_TOKEN], list(gradients)


@pytest.mark.parametrize("layers", ["all", 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_those_of_rows_by_themselves(
    shape: str, layers: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_adapters(shape, "policy", layers=layers)
    counts = count_tokens(model)
    packed, gradients = learnt(model)
    again, checkpointed = learnt(model, is_checkpointed=True)
    unpacked(model, monkeypatch)
    alone, expected = learnt(model)
    assert counts == [NUM_DISTINCT, NUM_DISTINCT, ROWS.numel()]
    assert torch.equal(packed, again)
    assert distance(packed, alone) < 1e-5
    for ours, twice, theirs in zip(gradients, checkpointed, expected, strict=True):
        assert torch.equal(ours, twice)
        assert distance(ours, theirs) < 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_pass_that_learns_says_to_the_bit_what_one_that_only_looks_does(dtype: str) -> None:
    model = with_adapters("llama", "policy", dtype=dtype)
    with torch.no_grad(), model.role("policy"):
        looked = model.hidden(ROWS, IS_TOKEN)[IS_TOKEN]
    assert torch.equal(looked, learnt(model)[0])  # or the first ratio would not be 1


def test_in_bfloat16_packed_rows_are_as_near_to_float32_as_others(monkeypatch: pytest.MonkeyPatch) -> None:
    model, whole = with_adapters("llama", "policy", dtype="bfloat16"), with_adapters("llama", "policy")
    exact, exact_gradients = learnt(whole)
    packed, gradients = learnt(model)
    unpacked(model, monkeypatch)
    alone, others = learnt(model)
    assert distance(packed, exact) <= 1.5 * distance(alone, exact)
    for ours, theirs, true in zip(gradients, others, exact_gradients, strict=True):
        assert distance(ours, true) <= 2 * distance(theirs, true)


@pytest.mark.parametrize("shape", SHAPES)
def test_pairs_share_their_prompt_and_the_beginning_of_prompts_too(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_adapters(shape, "reward")
    head = ScalarHead(model.hidden_size).initialize(0)
    rows = [
        TrainerRow(
            chosen_ids=[1, 2, 3, 4, own, 5, 6],
            rejected_ids=[1, 2, 3, 4, own, 7],
            labels=1.0,
            margin=0.0,
            length=8,
        )
        for own in (20, 21, 22)
    ]
    batch = Collator(0)(rows)
    counts = count_tokens(model)
    with torch.no_grad(), model.role("reward"):
        packed = batch_scores(model, head, batch)
        unpacked(model, monkeypatch)
        alone = batch_scores(model, head, batch)
    assert counts == [4 + 3 * (1 + 2 + 1), 6 * 7]
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_prompts_that_begin_alike_enter_together_and_are_answered_the_same(
    shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_adapters(shape, "sft")
    prompts = [(1, 2, 3, 4, 5, *own) for own in ((6,), (7, 8, 9), (6,), (10, 11))]
    counts = count_tokens(model)

    def respond() -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
        uniforms_BT = np.random.default_rng(0).random((4, 6))
        sampling = Sampling(1.0, 6, 8, 3)
        with model.role("sft"):
            found = generate(model, model.base.codec(None), prompts, sampling=sampling, uniforms_BT=uniforms_BT)
        return [(response.ids, response.logprobs) for response in found]

    packed = respond()
    assert counts[0] == 5 + 1 + 3  # the first three prompts, two of them equal
    unpacked(model, monkeypatch)
    alone = respond()
    assert [ids for ids, _ in packed] == [ids for ids, _ in alone]
    for (_, ours), (_, theirs) in zip(packed, alone, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)


def test_packed_prompts_enter_beside_rows_that_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_adapters("llama", "sft")
    prompts = [(1, 2, 3, 4, 5, *own) for own in ((6,), (7, 8, 9), (11,), (10, 11), (12,), (13,))]
    tokens: list[tuple[int, ...]] = []
    embeddings = model.base.model.get_input_embeddings()
    embeddings.register_forward_hook(lambda _, inputs, __: tokens.append(tuple(inputs[0].shape)))

    def respond() -> list[tuple[int, ...]]:
        with model.role("sft"):
            found = generate(
                model,
                model.base.codec(None),
                prompts,
                sampling=Sampling(1.0, 4, 8, 3),
                uniforms_BT=np.random.default_rng(0).random((6, 4)),
            )
        return [response.ids for response in found]

    packed = respond()
    assert [shape for shape in tokens if shape[0] == 1 and shape[1] > 1] == [(1, 5 + 1 + 3 + 1), (1, 5 + 2 + 1 + 1)]
    unpacked(model, monkeypatch)
    assert packed == respond()


def test_what_lower_layers_said_of_packed_rows_is_kept_with_how_they_are_packed() -> None:
    model = with_adapters("llama", "sft", "policy", layers=1)
    counts = count_tokens(model)

    def passes(*batches: Tensor) -> list[Tensor]:
        found: list[Tensor] = []
        for role, ids_BS in zip(("sft", "policy", "sft"), batches, strict=True):
            with torch.no_grad(), model.role(role):
                found.append(model.hidden(ids_BS, IS_TOKEN)[IS_TOKEN])
        return found

    kept, anew = passes(*[ROWS] * 3), passes(*(ROWS.clone() for _ in range(3)))
    assert all(torch.equal(one, other) for one, other in zip(kept, anew, strict=True))
    assert counts == [NUM_DISTINCT] * 6


def test_a_pass_that_fails_leaves_nothing_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_adapters("llama", "sft")
    monkeypatch.setattr(model.trunk, "norm", None)
    with pytest.raises(TypeError):
        model.hidden(ROWS, IS_TOKEN)
    assert packing.present() is None


# ---- which bases may ----


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bases_with_our_attention_may(shape: str, dtype: str) -> None:
    assert resident(shape, dtype=dtype).packings.longest > 0


def longest(model: AdaptedModel) -> float:
    return AdaptedModel(model.base, AdaptersConfig()).packings.longest


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_base_with_an_attention_of_its_own_may_not(dtype: str) -> None:
    model = resident("llama", dtype=dtype)
    assert longest(model) > 0
    model.base.model.set_attn_implementation("eager")
    assert longest(model) == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiled_layers_take_packed_rows_where_attention_need_not_unpack_them(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = dataclasses.replace(resident(save_wide_llama(tmp_path), dtype=dtype).base, is_compiled=True)

    def longest_compiled() -> float:
        return AdaptedModel(base, AdaptersConfig()).compiled_packings.longest

    if row_attention._dtypes:  # pyright: ignore[reportPrivateUsage]
        assert longest_compiled() == row_attention.LONGEST
    monkeypatch.setattr(row_attention, "fits", lambda *_: False)
    assert longest_compiled() == 0


def test_a_base_whose_layers_pass_on_by_other_ways_may_not(monkeypatch: pytest.MonkeyPatch) -> None:
    model = resident("llama")
    norm = model.trunk.norm

    class Summing(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            assert isinstance(norm, nn.Module)
            return norm(hidden).cumsum(1)

    monkeypatch.setattr(model.trunk, "norm", Summing())
    assert longest(model) == 0


@pytest.mark.parametrize(("window", "may"), [(6, True), (5, False)])
def test_rows_longer_than_a_layers_window_may_not(window: int, may: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    base = resident("llama").base
    monkeypatch.setattr(base.model.config, "sliding_window", window, raising=False)
    model = AdaptedModel(base, AdaptersConfig())
    counts = count_tokens(model)
    with torch.no_grad():
        model.hidden(ROWS, IS_TOKEN)
    assert counts == [NUM_DISTINCT if may else ROWS.numel()]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_rows_stand_alone_while_a_trainer_draws_dropout_for_each_token(dropout: float) -> None:
    model = with_adapters("llama", "reward", dropout=dropout)
    counts = count_tokens(model)
    for is_training in (False, True):
        model.trunk.train(is_training)
        with model.role("reward", train=True):
            model.plain_hidden(ROWS, IS_TOKEN)
    assert counts == [NUM_DISTINCT, ROWS.numel() if dropout else NUM_DISTINCT]


def test_so_they_do_while_attention_drops(monkeypatch: pytest.MonkeyPatch) -> None:
    model = resident("llama")
    monkeypatch.setattr(model.base.model.config, "attention_dropout", 0.1)
    model.add("reward")
    counts = count_tokens(model)
    for is_training in (False, True):
        model.trunk.train(is_training)
        with model.role("reward"):
            model.plain_hidden(ROWS, IS_TOKEN)
    assert counts == [NUM_DISTINCT, ROWS.numel()]


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ({"attention_chunk_size": 5}, 5),
        ({"sliding_window": 7, "attention_chunk_size": 5}, 5),
        ({"sliding_window": 4, "attention_chunk_size": 5}, 4),
        ({"attn_temperature_tuning": True}, 0),
        ({}, math.inf),
    ],
)
def test_how_long_rows_may_be_packed_by_what_the_config_says_of_attention(
    setting: dict[str, Any], expected: float
) -> None:
    model = resident()
    found = longest_packed(model.trunk, SimpleNamespace(**setting), device=model.device, dtype=model.base.dtype)
    assert found == expected
