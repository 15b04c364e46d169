from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from align.attention import _attend, _mask  # pyright: ignore[reportPrivateUsage]
from align.kernels import row_attention
from tests.resident import SHAPES, distance, resident


@pytest.mark.parametrize("has_mask", [True, False])
@pytest.mark.parametrize(("length", "num_heads", "num_groups"), [(1, 6, 2), (1, 4, 4), (1, 5, 1), (7, 6, 2)])
def test_grouped_attention_is_that_of_repeated_keys_and_values(
    length: int, num_heads: int, num_groups: int, has_mask: bool
) -> None:
    torch.manual_seed(0)
    query = torch.randn(3, num_heads, length, 8)
    key, value = torch.randn(2, 3, num_groups, 7, 8)
    mask = torch.rand(3, 1, length, 7) < 0.7 if has_mask else None
    if mask is not None:
        mask[..., 0] = True
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = num_heads // num_groups, True  # type: ignore[assignment]
    expected, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)
    found, _ = _attend(module, query, key, value, mask, scaling=0.3)
    torch.testing.assert_close(found, expected)


def test_grouped_attention_takes_a_mask_of_each_head_and_what_comes_in_another_layout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    query, (key, value) = torch.randn(3, 6, 1, 8), torch.randn(2, 3, 2, 7, 8)
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = 3, True  # type: ignore[assignment]
    of_heads = torch.rand(3, 6, 1, 7) < 0.7
    of_heads[..., 0] = True
    expected, _ = sdpa_attention_forward(module, query, key, value, of_heads, scaling=0.3)
    torch.testing.assert_close(_attend(module, query, key, value, of_heads, scaling=0.3)[0], expected)
    of_all = of_heads[:, :1]
    expected, _ = _attend(module, query, key, value, of_all, scaling=0.3)
    own = torch.nn.functional.scaled_dot_product_attention

    def as_on_cuda(*args: Any, **kwargs: Any) -> Tensor:
        return own(*args, **kwargs).transpose(1, 2).contiguous().transpose(1, 2)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", as_on_cuda)
    torch.testing.assert_close(_attend(module, query, key, value, of_all, scaling=0.3)[0], expected)


def test_a_loaded_base_uses_it() -> None:
    assert resident("llama").base.model.config._attn_implementation == "align_sdpa"  # pyright: ignore[reportPrivateUsage]


# ---- the mask ----


def mask_of(*rows: str, keys: int = 4, **options: Any) -> Tensor | None:
    """Of rows as "##__", a token or padding each."""
    is_token_BS = torch.tensor([[char == "#" for char in row] for row in rows])
    return _mask(len(rows), 4, keys, attention_mask=is_token_BS, **options)


def test_padding_on_the_right_alone_needs_no_mask() -> None:
    assert mask_of("####", "##__", "#___") is None
    assert mask_of("####", "__##") is not None
    assert mask_of("####", "#_##") is not None
    assert mask_of("#####_", "####__", keys=6, q_offset=2) is not None  # there is a cache


def test_a_window_keeps_its_mask_and_sees_what_it_saw() -> None:
    def window(batch: int, head: int, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key > query - 2)

    mask = mask_of("####", "##__", mask_function=window, local_size=2)
    assert mask is not None
    assert mask.expand(2, 1, 4, 4)[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]


@pytest.mark.parametrize("shape", SHAPES)
def test_tokens_before_padding_are_the_same_with_and_without_a_mask(shape: str) -> None:
    trunk = resident(shape).trunk
    ids_BS = torch.randint(0, 250, (3, 9), generator=torch.Generator().manual_seed(0))
    is_token_BS = torch.arange(9) < torch.tensor([9, 6, 2])[:, None]
    with torch.no_grad():
        masked = trunk(input_ids=ids_BS, attention_mask=is_token_BS).last_hidden_state
        plain = trunk(input_ids=ids_BS).last_hidden_state
    torch.testing.assert_close(masked[is_token_BS], plain[is_token_BS])


# ---- short rows of a CPU ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_causal_attention_of_short_rows_goes_to_row_attention_and_no_other(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []

    def watched(query: Tensor, *_: Any) -> Tensor:
        taken.append(query.shape[2])
        return query.transpose(1, 2)

    monkeypatch.setattr(row_attention, "attend", watched)
    monkeypatch.setattr(row_attention, "_dtypes", frozenset((dtype,)))
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = 3, True  # type: ignore[assignment]
    longest = row_attention.LONGEST
    for length in (2, 80, longest):
        query, key, value = (torch.randn(2, heads, length, 16).to(dtype) for heads in (6, 2, 2))
        _attend(module, query, key, value, None, scaling=0.3)
    assert taken == [2, 80, longest]
    query, key, value = (torch.randn(2, heads, 8, 16).to(dtype) for heads in (6, 2, 2))
    _attend(module, query, key, value, torch.ones(2, 1, 8, 8, dtype=torch.bool), scaling=0.3)
    _attend(module, query, key, value, None, scaling=0.3, is_causal=False)
    _attend(module, query, key, value, None, scaling=0.3, dropout=0.1)
    _attend(module, query[:, :, -1:], key, value, None, scaling=0.3)
    assert len(taken) == 3


@pytest.mark.parametrize("length", [2, 80, 256, 257])
def test_the_gradients_in_bfloat16_are_no_further_from_the_exact_ones_than_torchs(length: int) -> None:
    def gradients(inputs: list[Tensor], attend: Any) -> list[Tensor]:
        """The output and the gradients of Σ weight · attention by queries, keys and values."""
        inputs = [tensor.clone().requires_grad_() for tensor in inputs]
        module = nn.Module()
        module.num_key_value_groups, module.is_causal = 3, True  # type: ignore[assignment]
        out, _ = attend(module, *inputs, None, scaling=0.3)
        return [out.detach(), *torch.autograd.grad((out * weight.to(out.dtype)).sum(), inputs)]

    torch.manual_seed(0)
    narrow = [torch.randn(2, heads, length, 16).bfloat16() for heads in (6, 2, 2)]
    weight = torch.randn(2, length, 6, 16)
    exact = gradients([tensor.float() for tensor in narrow], sdpa_attention_forward)
    theirs = gradients(narrow, sdpa_attention_forward)
    ours = gradients(narrow, _attend)
    for own, other, true in zip(ours, theirs, exact, strict=True):
        assert own.dtype == other.dtype
        assert distance(own, true) <= 1.01 * distance(other, true)


@pytest.mark.parametrize("shape", SHAPES)
def test_with_and_without_it_a_model_says_the_same(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trunk = resident(shape).trunk
    ids_BS = torch.randint(0, 250, (3, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        own = trunk(input_ids=ids_BS).last_hidden_state
        monkeypatch.setattr(row_attention, "_dtypes", frozenset[torch.dtype]())
        torchs = trunk(input_ids=ids_BS).last_hidden_state
    torch.testing.assert_close(own, torchs)
