import math

import pytest
import torch

from stages.sft.objective import negative_log_likelihood


def test_the_nll_is_the_mean_over_tokens_in_nats() -> None:
    # −(ln 1/2 + ln 1/8) / 2 = (1 + 3)/2 · ln 2
    assert negative_log_likelihood(torch.tensor([0.5, 0.125]).log()).item() == pytest.approx(2 * math.log(2))


def test_the_nll_is_the_cross_entropy_of_torch() -> None:
    logits_NV = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    targets_N = torch.tensor([0, 8, 3, 3, 1])
    logprobs_N = logits_NV.log_softmax(-1)[torch.arange(5), targets_N]
    expected = torch.nn.functional.cross_entropy(logits_NV, targets_N)
    torch.testing.assert_close(negative_log_likelihood(logprobs_N), expected)
