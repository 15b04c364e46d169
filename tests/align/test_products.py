import os
import subprocess
import sys

import pytest
import torch

from align.base import native_dtype
from align.products import bound_kernel_caches, frozen_product


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


# ---- kernels that are kept ----

_MANY_SHAPES = """
import ctypes, os, sys, torch
from align.products import bound_kernel_caches

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
@pytest.mark.skipif(native_dtype(torch.device("cpu")) != torch.bfloat16, reason="no bfloat16 on this CPU")
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
