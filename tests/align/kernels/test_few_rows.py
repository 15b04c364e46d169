import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from align.kernels import few_rows
from align.kernels.products import frozen_product
from align.lora import _product as lora_product  # pyright: ignore[reportPrivateUsage]
from tests.align.kernels.test_native import HAS_COMPILER

DTYPES = few_rows._supported()  # pyright: ignore[reportPrivateUsage]
pytestmark = pytest.mark.skipif(not (DTYPES and HAS_COMPILER), reason="no AVX-512, or no C++ compiler")


@pytest.fixture(scope="module", autouse=True)
def _prepared() -> None:
    few_rows.prepare()
    assert few_rows._dtypes == set(DTYPES)  # pyright: ignore[reportPrivateUsage]
    has_amx = torch.cpu.get_capabilities().get("amx_bf16")
    assert few_rows._left == ({torch.bfloat16} if has_amx else set())  # pyright: ignore[reportPrivateUsage]


def drawn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture(params=[False, True], ids=["in one", "weights left to torch"])
def is_left(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether torch makes the product with the weight: of bfloat16 with AMX it does."""
    monkeypatch.setattr(few_rows, "_left", frozenset(DTYPES if request.param else ()))
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
def test_by_hand(dtype: torch.dtype, is_left: bool) -> None:
    """x Wᵀ = (1 − 2, 3 · 1) = (−1, 3); x Aᵀ = 1 + 2 = 3, times B and 0.5: (3, −1.5); and the bias (10, 20)."""
    x_NI, weight_OI = torch.tensor([[1.0, 2.0]], dtype=dtype), torch.tensor([[1.0, -1.0], [3.0, 0.0]], dtype=dtype)
    bias_O = torch.tensor([10.0, 20.0], dtype=dtype)
    a_RI, b_OR = torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0], [-1.0]])
    y_NO, low_NR = few_rows.product(x_NI, weight_OI, bias_O, a_RI, b_OR, 0.5)
    assert y_NO.tolist() == [[12.0, 21.5]]
    assert low_NR.tolist() == [[3.0]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 7, 8, 15, 16, 31, 64])
@pytest.mark.parametrize(
    ("num_in", "num_out", "rank"), [(1, 1, 0), (15, 3, 1), (32, 4, 16), (50, 33, 17), (97, 12, 40)]
)
def test_any_shape_is_the_exact_product_but_for_rounding(
    dtype: torch.dtype, num_rows: int, num_in: int, num_out: int, rank: int, is_left: bool
) -> None:
    x_NI, weight_OI = drawn(num_rows, num_in, seed=0, dtype=dtype), drawn(num_out, num_in, seed=1, dtype=dtype)
    bias_O = drawn(num_out, seed=2, dtype=dtype) if rank != 1 else None
    a_RI, b_OR = (drawn(rank, num_in, seed=3), drawn(num_out, rank, seed=4)) if rank else (None, None)
    y_NO, low_NR = few_rows.product(x_NI, weight_OI, bias_O, a_RI, b_OR, 0.25)
    exact = x_NI.double() @ weight_OI.double().t()
    if a_RI is not None and b_OR is not None:
        exact_low = x_NI.double() @ a_RI.double().t()
        exact = exact + 0.25 * exact_low @ b_OR.double().t()
        torch.testing.assert_close(low_NR.double(), exact_low, rtol=1e-5, atol=1e-4)
    if bias_O is not None:
        exact = exact + bias_O.double()
    assert y_NO.dtype == dtype
    rounding = 1e-5 if dtype == torch.float32 else 2**-8
    before = rounding * exact.abs().max().item() if is_left and rank else 0.0  # it is rounded before the sum, too
    torch.testing.assert_close(y_NO.double(), exact, rtol=rounding, atol=1e-4 + before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_said_of_a_row_depends_neither_on_its_company_nor_on_threads(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(few_rows, "_left", frozenset[torch.dtype]())
    x_NI, weight_OI = drawn(23, 50, seed=0, dtype=dtype), drawn(33, 50, seed=1, dtype=dtype)
    a_RI, b_OR = drawn(3, 50, seed=2), drawn(33, 3, seed=3)
    whole_NO, _ = few_rows.product(x_NI, weight_OI, None, a_RI, b_OR)
    threads = torch.get_num_threads()
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            for rows in (slice(0, 1), slice(1, 4), slice(4, 23), slice(0, 23)):
                assert torch.equal(few_rows.product(x_NI[rows], weight_OI, None, a_RI, b_OR)[0], whole_NO[rows])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_may_lie_apart_in_memory(dtype: torch.dtype) -> None:
    x_NI = drawn(6, 40, seed=0, dtype=dtype)
    weight_OI = drawn(5, 20, seed=1, dtype=dtype)
    found_NO, _ = few_rows.product(x_NI[::2, 20:], weight_OI)
    assert torch.equal(found_NO, few_rows.product(x_NI[::2, 20:].clone(), weight_OI)[0])


def test_a_compiler_leaves_it_as_it_is() -> None:
    weight_OI, a_RI, b_OR = drawn(9, 7, seed=1), drawn(2, 7, seed=2), drawn(9, 2, seed=3)

    def said(x_NI: Tensor) -> Tensor:
        return few_rows.product(x_NI, weight_OI, None, a_RI, b_OR)[0] + 1

    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(said, dynamic=True, backend=counter)
    graphs: set[int] = set()
    for rows in (5, 4, 3):
        own_NI = drawn(rows, 7, seed=rows)
        assert torch.equal(compiled(own_NI), said(own_NI))
        graphs.add(counter.frame_count)
    assert len(graphs) == 1  # none is made for another number of rows


def test_it_is_left_where_it_would_be_wrong() -> None:
    x_NI, weight_OI = drawn(3, 8, seed=0), drawn(4, 8, seed=1)
    assert few_rows.fits(x_NI, weight_OI)
    assert not few_rows.fits(x_NI.double(), weight_OI)
    assert not few_rows.fits(x_NI.bfloat16(), weight_OI)
    assert not few_rows.fits(x_NI[:, :7], weight_OI)
    assert not few_rows.fits(x_NI, weight_OI.to("meta"))
    assert not few_rows.fits(x_NI[:0], weight_OI)
    wanted_NI = x_NI.clone().requires_grad_()
    assert not few_rows.fits(wanted_NI, weight_OI)  # it has no gradient
    frozen_product(wanted_NI, weight_OI).sum().backward()
    torch.testing.assert_close(wanted_NI.grad, weight_OI.sum(0).expand(3, 8))


def test_a_compiler_has_loops_for_what_is_added_to_torchs_product(monkeypatch: pytest.MonkeyPatch) -> None:
    x_NI, weight_OI = drawn(3, 8, seed=0), drawn(4, 8, seed=1)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert few_rows.fits(x_NI, weight_OI)
    monkeypatch.setattr(few_rows, "_left", frozenset(DTYPES))
    assert not few_rows.fits(x_NI, weight_OI)


def test_frozen_layers_and_lora_take_it_for_few_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    product = few_rows.product

    def counted(x_NI: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        taken.append(len(x_NI))
        return product(x_NI, *args)

    monkeypatch.setattr(few_rows, "product", counted)
    weight_OI, a_RI, b_OR = drawn(9, 7, seed=1), drawn(2, 7, seed=2), drawn(9, 2, seed=3)
    for num_rows in (few_rows.FEW, few_rows.FEW + 1):
        x_NI = drawn(num_rows, 7, seed=0)
        frozen_product(x_NI, weight_OI)
        lora_product(x_NI, weight_OI, None, a_RI, b_OR, 0.5)
    assert taken == [few_rows.FEW] * 2
    frozen_product(x_NI[:3], weight_OI.t().contiguous().t())  # GPT-2's lie the other way round
    assert taken == [few_rows.FEW] * 2


def test_without_a_compiler_it_says_so_and_torchs_products_do_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(few_rows, "_dtypes", frozenset[torch.dtype]())
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    x_NI, weight_OI = drawn(3, 7, seed=0), drawn(9, 7, seed=1)
    with caplog.at_level(logging.WARNING):
        few_rows.prepare()
    assert "answers are generated more slowly" in caplog.text
    assert not few_rows.fits(x_NI, weight_OI)
    torch.testing.assert_close(frozen_product(x_NI, weight_OI), x_NI @ weight_OI.t())
