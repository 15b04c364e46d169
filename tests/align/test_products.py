import pytest
import torch

from align.products import frozen_product


@pytest.mark.parametrize("num_rows", [1, 32, 33])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_rows_or_many_it_is_the_linear_layer(num_rows: int, has_bias: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x_NI, weight_OI, bias_O = (
        torch.randn(shape, generator=generator).to(dtype) for shape in ((num_rows, 7), (5, 7), (5,))
    )
    found_NO = frozen_product(x_NI, weight_OI, bias_O if has_bias else None)
    torch.testing.assert_close(found_NO, torch.nn.functional.linear(x_NI, weight_OI, bias_O if has_bias else None))
    assert found_NO.is_contiguous()
