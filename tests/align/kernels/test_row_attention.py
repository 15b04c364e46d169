from collections.abc import Sequence
from math import log
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from align.kernels import cpu, row_attention
from align.kernels.row_attention import attend, fits
from align.packing import PackedRows
from tests.align.kernels.test_native import HAS_COMPILER

States = tuple[Tensor, Tensor, Tensor]
DTYPES = (torch.float32, torch.bfloat16)
pytestmark = pytest.mark.skipif(not (cpu.has_avx512() and HAS_COMPILER), reason="no AVX-512, or no C++ compiler")
SHAPES = [(2, 9, 3, 58, 64), (3, 4, 4, 7, 16), (1, 4, 2, 100, 80), (2, 2, 1, 33, 48), (1, 2, 2, 130, 32)]
TREES = {  # rows of ids; 0 is padding
    "a prompt": [[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 7, 0], [1, 2, 3, 9, 8, 7], [1, 2, 3, 9, 0, 0]],
    "twice the same": [[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 0, 0], [1, 2, 3, 5]],
    "a row of nothing": [[1, 2, 3, 4], [0, 0, 0, 0], [1, 2, 3, 5], [1, 0, 0, 0]],
    "nothing but padding in common": [[1, 2, 0, 0], [3, 0, 0, 0], [4, 5, 6, 7]],
    "long": [[*range(1, 60)], [*range(1, 40), *range(70, 80), *[0] * 10], [*range(1, 21), *[0] * 39]],
}


@pytest.fixture(scope="module", autouse=True)
def _prepared() -> None:
    row_attention.prepare()
    assert row_attention._dtypes == set(DTYPES)  # pyright: ignore[reportPrivateUsage]


def drawn(batch: int, heads: int, groups: int, length: int, size: int, dtype: torch.dtype) -> States:
    """Queries, keys and values as a layer makes them, (B, heads, S, D) seen through strides."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, length, count, size) for count in (heads, groups, groups)]
    query, key, value = (torch.randn(shape, generator=generator).to(dtype).transpose(1, 2) for shape in shapes)
    return query, key, value


def weights(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def plain(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    shared_by = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(shared_by, 1) for states in (key, value))
    scores = scale * query @ key.transpose(2, 3)
    future = torch.ones(scores.shape[2:], dtype=torch.bool).triu(1)
    return (scores.masked_fill(future, -torch.inf).softmax(-1) @ value).transpose(1, 2)


def learnt(states: Sequence[Tensor], weight: Tensor, packing: PackedRows | None, scale: float) -> list[Tensor]:
    """The answers, and the gradients of Σ weight · answers by queries, keys and values."""
    states = [tensor.detach().requires_grad_() for tensor in states]
    out = attend(states[0], states[1], states[2], packing, scale)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), states)]


def exact(states: Sequence[Tensor], weight: Tensor, scale: float) -> list[Tensor]:
    states = [tensor.double().requires_grad_() for tensor in states]
    out = plain(states[0], states[1], states[2], scale)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), states)]


def assert_close(found: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    for own, true in zip(found, expected, strict=True):
        assert own.dtype == dtype
        assert (own.double() - true).norm() <= {torch.float32: 2e-6, torch.bfloat16: 1e-2}[dtype] * true.norm()


@pytest.mark.parametrize("dtype", DTYPES)
def test_by_hand(dtype: torch.dtype) -> None:
    """Scores (ln 3, 0) of the second token make weights (3/4, 1/4) of values 4 and 8: 5. With a gradient of 1 its
    scores have (3/4 · (4 − 5), 1/4 · (8 − 5)) = (−3/4, 3/4). The first sees itself alone."""
    query, key, value = (torch.zeros(1, 1, 2, 16, dtype=dtype) for _ in range(3))
    query[..., 1, 0], key[..., 0, 0] = 1.0, log(3)
    value[..., 0, 0], value[..., 1, 0] = 4.0, 8.0
    weight = torch.zeros(1, 2, 1, 16, dtype=dtype)
    weight[0, 1, 0, 0] = 1.0
    out, *gradients = (tensor[..., 0].flatten().tolist() for tensor in learnt([query, key, value], weight, None, 1.0))
    rounding = {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    assert out == pytest.approx([4.0, 5.0], rel=rounding)
    expected = [[0.0, -0.75 * log(3)], [-0.75, 0.75], [0.75, 0.25]]
    for found, by_hand in zip(gradients, expected, strict=True):
        assert found == pytest.approx(by_hand, rel=rounding)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_answers_and_gradients_are_exact_but_for_rounding(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype
) -> None:
    states = drawn(*shape, dtype)
    weight = weights(*states[0].transpose(1, 2).shape, dtype=dtype)
    expected = exact(states, weight, 0.3)
    assert_close(learnt(states, weight, None, 0.3), expected, dtype)
    contiguous = [tensor.contiguous() for tensor in states]  # the other layout in memory
    assert_close(learnt(contiguous, weight, None, 0.3), expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", TREES.values(), ids=TREES)
def test_packed_rows_are_answered_as_rows_by_themselves(rows: list[list[int]], dtype: torch.dtype) -> None:
    ids = torch.tensor(rows)
    is_token = ids > 0
    packing = PackedRows.of(ids, is_token)
    assert packing is not None
    states = drawn(1, 6, 2, len(packing.first_N), 32, dtype)
    weight = weights(1, len(packing.first_N), 6, 32, dtype=dtype)
    wide = [tensor.double().requires_grad_() for tensor in states]
    unpacked = [packing.unpack(tensor, dim=2) for tensor in wide]
    out = packing.pack(plain(unpacked[0], unpacked[1], unpacked[2], 0.3))
    expected = [out.detach(), *torch.autograd.grad((out * weight).sum(), wide)]
    assert_close(learnt(states, weight, packing, 0.3), expected, dtype)


def test_neither_threads_nor_neighbours_change_a_bit() -> None:
    packing = PackedRows.of(ids := torch.tensor(TREES["a prompt"]), ids > 0)
    assert packing is not None
    cases = [(drawn(3, 6, 2, 40, 32, torch.float32), None), (drawn(1, 6, 2, 10, 32, torch.float32), packing)]
    for states, how in cases:
        weight = weights(*states[0].transpose(1, 2).shape)
        found = learnt(states, weight, how, 0.3)
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(1 if threads > 1 else 2)
            assert all(map(torch.equal, found, learnt(states, weight, how, 0.3)))
        finally:
            torch.set_num_threads(threads)
        if how is None:
            alone = learnt([tensor[1:2] for tensor in states], weight[1:2], None, 0.3)
            assert all(torch.equal(own, other[1:2]) for own, other in zip(alone, found, strict=True))


@pytest.mark.parametrize("place", range(29, 37))
def test_a_token_sees_none_that_follow(place: int) -> None:
    states = drawn(1, 2, 1, 50, 16, torch.float32)
    before = attend(states[0], states[1], states[2], None, 0.3)
    for tensor in states:
        tensor[:, :, place:] *= 1e6
    after = attend(states[0], states[1], states[2], None, 0.3)
    assert torch.equal(before[:, :place], after[:, :place])
    assert not torch.equal(before[:, place], after[:, place])


def test_what_is_no_number_stays_none() -> None:
    states = drawn(1, 2, 1, 50, 16, torch.float32)
    states[0][0, 0, 20, 3] = float("nan")
    out = attend(states[0], states[1], states[2], None, 0.3)
    assert out[0, 20, 0].isnan().all()
    assert out.isnan().sum() == 16


def test_gradients_and_keys_may_be_expanded_and_not_all_wanted() -> None:
    query, key, value = drawn(3, 2, 1, 20, 16, torch.float32)
    key, value = (states[:1].expand(3, -1, -1, -1) for states in (key, value))
    query.requires_grad_()
    attend(query, key, value, None, 0.3).sum().backward()
    wide = [states.detach().double().requires_grad_() for states in (query, key, value)]
    plain(wide[0], wide[1], wide[2], 0.3).sum().backward()
    torch.testing.assert_close(query.grad, wide[0].grad, check_dtype=False, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [1e4, -1e4, 1e15])
def test_scores_of_any_size_are_told_apart(size: float) -> None:
    states = drawn(1, 1, 1, 20, 16, torch.float32)
    weight = weights(1, 20, 1, 16)
    found = learnt(states, weight, None, size)
    assert all(tensor.isfinite().all() for tensor in found)
    torch.testing.assert_close(found[0].double(), exact(states, weight, size)[0], rtol=1e-3, atol=1e-3)


def test_what_fits() -> None:
    query, key, value = drawn(1, 2, 1, 20, 16, torch.float32)
    assert fits(query, key, value, None)
    for other in ((2, 1, 20, 24), (2, 1, row_attention.LONGEST + 1, 16), (2, 1, 1, 16)):
        assert not fits(*drawn(1, *other, torch.float32), None)
    assert not fits(*drawn(1, 2, 1, 20, 16, torch.float64), None)
    assert not fits(query, key, value[:, :, 1:], None)
    assert not fits(query, key[:, :, 1:], value[:, :, 1:], None)
    assert not fits(query.expand(2, -1, -1, -1), key, value, None)
    assert not fits(*drawn(1, 3, 2, 20, 16, torch.float32), None)
    assert not fits(query[:, :, -1:], key, value, None)  # decoding
    assert not fits(query, key.transpose(2, 3).contiguous().transpose(2, 3), value, None)


def test_without_a_compiler_nothing_fits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(row_attention, "_dtypes", frozenset[torch.dtype]())
    monkeypatch.setenv("CXX", f"{tmp_path}/none")
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path))
    row_attention.prepare()
    assert not fits(*drawn(1, 2, 1, 20, 16, torch.float32), None)


@pytest.mark.parametrize("is_packed", [False, True])
def test_one_graph_serves_all_shapes(is_packed: bool) -> None:
    torch._dynamo.reset()  # pyright: ignore[reportPrivateUsage]
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, dynamic=True, fullgraph=True)
    def compiled(query: Tensor, key: Tensor, value: Tensor, packing: PackedRows | None) -> Tensor:
        assert fits(query, key, value, packing)
        return attend(query, key, value, packing, 0.3)

    for name in ("a prompt", "long"):
        ids = torch.tensor(TREES[name])
        packing = PackedRows.of(ids, ids > 0) if is_packed else None
        shape = ids.shape if packing is None else (1, len(packing.first_N))
        states = [tensor.requires_grad_() for tensor in drawn(shape[0], 14, 2, shape[1], 32, torch.float32)]
        weight = weights(*shape, 14, 32)
        out = compiled(states[0], states[1], states[2], packing)
        found = [out.detach(), *torch.autograd.grad((out * weight).sum(), states)]
        assert all(map(torch.equal, found, learnt(states, weight, packing, 0.3)))
    assert counter.frame_count == 1
