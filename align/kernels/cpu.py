"""What this machine's CPU is and can do, by which products and kernels are chosen."""

import platform
from functools import cache
from pathlib import Path

import torch

from align.artifacts import sha256_of_json

AVX512 = ("avx512_f", "avx512_bw", "avx512_dq", "avx512_vl", "fma3")  # what our C++ takes for granted
_INFO = Path("/proc/cpuinfo")


def has_avx512() -> bool:
    """Whether this CPU has all that our sources take for granted."""
    capabilities = torch.cpu.get_capabilities()
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and all(capabilities.get(name) for name in AVX512)


def is_made_by_amd() -> bool:
    """Whether it is AMD's, which asks for other choices than Intel's with the same instructions."""
    return _info().get("vendor_id") == "AuthenticAMD"


@cache
def description() -> str:
    """Its model and, as a digest, all that it can do, where the system says that."""
    info = _info()
    if not info:
        return platform.machine()
    flags = sha256_of_json(info.get("flags") or info.get("Features"))[:8]
    return f"{platform.machine()} {info.get('model name', '')} (flags {flags})"


def _info() -> dict[str, str]:
    """Of one of its cores, which are all alike; empty where there is no such file."""
    try:
        said = _INFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in said.splitlines())}
