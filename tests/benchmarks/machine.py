"""What a benchmark ran on, to be kept beside its results."""

import os
import platform
import time
from pathlib import Path

_SIZE = 2048
_COPIED = 2**28  # bytes: more than a cache holds
_REPEATS = 5
_EXTENSIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def describe_machine() -> dict[str, object]:
    """With what tells apart machines of one name, some of which hide what their processor can do."""
    lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
    of_first = {key.strip(): value.strip() for key, _, value in reversed(lines)}
    return {
        "cpu": of_first.get("model name", platform.machine()),
        "extensions": [name for name in _EXTENSIONS if name in of_first.get("flags", "").split()],
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }


def best_matrix_rate(dtype: str) -> float:
    """FLOP a second of a product of two 2048 × 2048 matrices, the best of five, with torch's present threads."""
    import torch  # here, so that a benchmark that only describes the machine does not load it

    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(_SIZE, _SIZE, generator=generator).to(getattr(torch, dtype)) for _ in range(2))
    torch.mm(left, right)  # the first one pays for threads and for choosing a kernel
    seconds: list[float] = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        torch.mm(left, right)
        seconds.append(time.perf_counter() - started)
    return 2 * _SIZE**3 / min(seconds)


def best_memory_bandwidth() -> float:
    """Bytes read and written a second by a copy of 256 MB, the best of five, with torch's present threads."""
    import torch

    source = torch.ones(_COPIED // 4)
    target = torch.empty_like(source)
    target.copy_(source)  # the first one pays for the pages
    seconds: list[float] = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - started)
    return 2 * _COPIED / min(seconds)
