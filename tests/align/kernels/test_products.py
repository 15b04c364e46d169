import os
import subprocess
import sys

import pytest
import torch

from align.kernels import products
from align.kernels.products import bound_kernel_caches, frozen_linear, frozen_product

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


@pytest.fixture(params=[False, pytest.param(True, marks=needs_onednn)], ids=["torch's", "oneDNN"])
def _library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each maker's choice of a library, whoever made this CPU."""
    monkeypatch.setattr(products, "_USES_ONEDNN", request.param)


@pytest.mark.usefixtures("_library")
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


@pytest.mark.usefixtures("_library")
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_frozen_layer_passes_the_linear_layers_gradient_on(has_bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight_OI, bias_O = (torch.randn(shape, generator=generator) for shape in ((3, 4, 7), (5, 7), (5,)))
    found, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
    said = frozen_linear(found, weight_OI, bias_O if has_bias else None)
    meant = torch.nn.functional.linear(expected, weight_OI, bias_O if has_bias else None)
    torch.testing.assert_close(said, meant)
    for out in (said, meant):
        out.square().sum().backward()
    torch.testing.assert_close(found.grad, expected.grad)


@needs_onednn
def test_a_compiler_leaves_onednns_product_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_USES_ONEDNN", True)
    generator = torch.Generator().manual_seed(0)
    x_NI, weight_OI = (torch.randn(shape, generator=generator) for shape in ((40, 7), (5, 7)))
    compiled = torch.compile(lambda x, w: frozen_product(x, w) + 1, dynamic=True)
    assert torch.equal(compiled(x_NI, weight_OI), frozen_product(x_NI, weight_OI) + 1)


# ---- kernels that are kept ----

_MANY_SHAPES = """
import ctypes, os, sys, torch
from align.kernels.products import bound_kernel_caches

def resident():
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

if sys.argv[1] == "bounded":
    bound_kernel_caches()
torch.set_num_threads(1)
x_NI, weight_OI = torch.ones(1100, 192).bfloat16(), torch.ones(576, 192).bfloat16()
torch.mm(x_NI[:7], weight_OI.t())
before = resident()
for rows in range(100, 1100, 2):
    torch.mm(x_NI[:rows], weight_OI.t())
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc and glibc")
@pytest.mark.skipif(
    not any(torch.cpu.get_capabilities().get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16")),
    reason="no bfloat16 on this CPU",
)
def test_products_of_many_shapes_leave_few_kernels_behind() -> None:
    # a base that an earlier test loaded has set them for this process
    plain = {name: value for name, value in os.environ.items() if not name.endswith("CACHE_CAPACITY")}
    kept: dict[str, int] = {}
    for how in ("bounded", "unbounded"):
        command = [sys.executable, "-c", _MANY_SHAPES, how]
        kept[how] = int(subprocess.run(command, env=plain, capture_output=True, check=True).stdout)
    assert kept["bounded"] < kept["unbounded"] / 3, kept


def test_what_the_user_has_set_for_the_kernels_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    bound_kernel_caches()
    assert os.environ["LRU_CACHE_CAPACITY"] == "7"
    assert os.environ.pop("ONEDNN_PRIMITIVE_CACHE_CAPACITY") == "64"
