import math

import pytest
import torch
from torch import Tensor

import align.logprobs
from align.errors import InvariantError
from align.logprobs import LMHead, token_logprobs

HEADS = {
    "plain": {},
    "with a bias": {"bias": True},
    "scaled": {"scale": 0.25},
    "capped": {"softcap": 2.0},
    "all of it": {"bias": True, "scale": 1.5, "softcap": 3.0},
}


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def head_of(kind: str, *, size: int = 11, width: int = 5) -> LMHead:
    options: dict[str, float] = {**HEADS[kind]}
    bias = drawn(size, seed=2) if options.pop("bias", False) else None
    return LMHead(drawn(size, width, seed=1), bias, **options)


def plainly(head: LMHead, hidden_NH: Tensor, targets_N: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    distribution_NV = (head.logits(hidden_NH) / temperature).log_softmax(-1)
    entropy_N = -(distribution_NV.exp() * distribution_NV).sum(-1)
    return distribution_NV.gather(-1, targets_N[:, None])[:, 0], entropy_N


def test_a_logprob_its_entropy_and_their_gradients_worked_by_hand() -> None:
    # One hidden state h = 1, W = (0, ln 3): p = (1/4, 3/4). log p_1 = ln 3/4; its gradient W_1 − Σ p W = ln 3 / 4.
    # H = ln 4 − 3/4 ln 3; its gradient −Σ p (z − 3/4 ln 3) W = −3/4 · 1/4 ln 3 · ln 3.
    hidden_NH = torch.ones(1, 1, requires_grad=True)
    head = LMHead(torch.tensor([[0.0], [math.log(3)]]))
    logprobs_N, entropy_N = token_logprobs(head, hidden_NH, torch.tensor([1]), with_entropy=True)
    assert entropy_N is not None
    assert logprobs_N.item() == pytest.approx(math.log(3 / 4))
    assert entropy_N.item() == pytest.approx(math.log(4) - 3 / 4 * math.log(3))
    (of_logprob,) = torch.autograd.grad(logprobs_N.sum(), hidden_NH, retain_graph=True)
    (of_entropy,) = torch.autograd.grad(entropy_N.sum(), hidden_NH)
    assert of_logprob.item() == pytest.approx(math.log(3) / 4)
    assert of_entropy.item() == pytest.approx(-3 / 16 * math.log(3) ** 2)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize(("rows", "tile"), [(1024, 2048), (2, 4), (3, 1), (1, 11)])
def test_walking_in_tiles_is_the_plain_log_softmax_with_its_gradient(
    kind: str, rows: int, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(align.logprobs, "ROWS", rows)
    monkeypatch.setattr(align.logprobs, "TILE", tile)
    head, targets_N = head_of(kind), torch.tensor([0, 3, 4, 10, 7, 7, 2])
    hidden_NH = (3 * drawn(7, 5, seed=3)).requires_grad_()
    weights_N = torch.linspace(-1, 1, 7)
    expected = plainly(head, hidden_NH, targets_N, 0.7)
    found = token_logprobs(head, hidden_NH, targets_N, temperature=0.7, with_entropy=True)
    assert found[1] is not None

    def gradient(values_N: Tensor) -> Tensor:
        return torch.autograd.grad((weights_N * values_N).sum(), hidden_NH, retain_graph=True)[0]

    for ours_N, plain_N in zip((found[0], found[1]), expected, strict=True):
        torch.testing.assert_close(ours_N, plain_N.float())
        torch.testing.assert_close(gradient(ours_N), gradient(plain_N), rtol=1e-6, atol=1e-6)
    ours, plain = gradient(found[0] + 0.1 * found[1]), gradient(expected[0] + 0.1 * expected[1])
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-6)


def test_the_same_bits_with_and_without_gradients_and_entropy() -> None:
    # what makes the first ratio exactly 1
    for dtype in (torch.float32, torch.bfloat16):
        head = LMHead(drawn(5000, 16, seed=1).to(dtype))
        hidden_NH, targets_N = drawn(9, 16, seed=2).to(dtype), torch.arange(9) * 500
        with torch.no_grad():
            logprobs_N, _ = token_logprobs(head, hidden_NH, targets_N, with_entropy=True)
        learnt_N, _ = token_logprobs(head, hidden_NH.requires_grad_(), targets_N)
        assert logprobs_N.dtype == torch.float32
        assert torch.equal(learnt_N, logprobs_N)


@pytest.mark.parametrize("is_learning", [True, False])
def test_the_full_vocabulary_logits_are_never_held(is_learning: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(align.logprobs, "ROWS", 4)
    monkeypatch.setattr(align.logprobs, "TILE", 3)
    shapes: list[tuple[int, ...]] = []
    plain = LMHead.logits

    def spied(head: LMHead, hidden: Tensor, tile: slice = slice(None)) -> Tensor:
        logits = plain(head, hidden, tile)
        shapes.append(tuple(logits.shape))
        return logits

    monkeypatch.setattr(LMHead, "logits", spied)
    hidden_NH = drawn(6, 5, seed=0).requires_grad_(is_learning)
    logprobs_N, _ = token_logprobs(head_of("plain"), hidden_NH, torch.arange(6))
    if is_learning:
        logprobs_N.sum().backward()  # and none of it is computed again
    assert shapes == [(4, 3), (4, 3), (4, 3), (4, 2), (2, 3), (2, 3), (2, 3), (2, 2)]


def test_no_tokens_have_no_logprobs() -> None:
    logprobs_N, entropy_N = token_logprobs(head_of("plain"), drawn(0, 5, seed=0), torch.arange(0), with_entropy=True)
    assert entropy_N is not None
    assert (logprobs_N.shape, entropy_N.shape) == ((0,), (0,))


def test_a_head_that_is_to_learn_is_refused() -> None:
    # its weight would get no gradient from here, and nobody would notice
    head = LMHead(drawn(11, 5, seed=1).requires_grad_())
    with pytest.raises(InvariantError, match="the LM head requires grad"):
        token_logprobs(head, drawn(2, 5, seed=0).requires_grad_(), torch.arange(2))


def test_logits_far_apart_neither_overflow_nor_vanish() -> None:
    hidden_NH = torch.ones(1, 1)
    head = LMHead(torch.tensor([[-3e4], [0.0], [3e4], [3e4]]))
    logprobs_N, entropy_N = token_logprobs(head, hidden_NH.expand(4, 1), torch.arange(4), with_entropy=True)
    assert entropy_N is not None
    assert logprobs_N.tolist() == pytest.approx([-6e4 - math.log(2), -3e4 - math.log(2), -math.log(2), -math.log(2)])
    assert entropy_N.tolist() == pytest.approx([math.log(2)] * 4)
