import pytest
import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from align.attention import _attend  # pyright: ignore[reportPrivateUsage]
from tests.resident import resident


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


def test_a_loaded_base_uses_it() -> None:
    assert resident("llama").base.model.config._attn_implementation == "align_sdpa"  # pyright: ignore[reportPrivateUsage]
