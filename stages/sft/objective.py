"""The formulas of supervised fine-tuning."""

from torch import Tensor


def negative_log_likelihood(logprobs_N: Tensor) -> Tensor:
    """NLL per token in nats, −1/N Σ log p(x_n | x_<n), over the N tokens that are learnt: () from (N,)."""
    assert logprobs_N.ndim == 1, logprobs_N.shape
    return -logprobs_N.mean()
