"""Our C++ for CPUs with AVX-512, for work in which the libraries that torch brings are slow: compiled once, when a base
is loaded, and kept in the cache folder. Without a C++ compiler, or AVX-512, torch's own operators do the work."""

import ctypes
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from align.artifacts import sha256_of_json
from align.embedded import cache_folder
from align.kernels.cpu import AVX512

_COMPILERS = ("g++", "c++")
_FLAGS = ("-O3", "-std=c++17", "-fopenmp", "-fPIC", "-shared")
_present: set[str] = set()  # what was loaded, by the names of the files


def present() -> list[str]:
    """The libraries of ours that this process computes with: they round otherwise than torch's own operators do."""
    return sorted(_present)


def library(source: Path, *flags: str, loss: str) -> ctypes.CDLL | None:
    """The compiled source, from the cache folder or put there. If it cannot be had, None, and a warning that begins
    with the `loss`."""
    try:
        return _loaded(source, flags)
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        said = str(getattr(error, "stderr", None) or error).strip().splitlines() or [repr(error)]
        logging.getLogger(__name__).warning(
            "%s: %s could not be compiled or loaded: %s",
            loss,
            source.name,
            next((line for line in said if "error" in line), said[0]),
        )
        return None


def function(library: ctypes.CDLL, name: str, dtype: torch.dtype) -> Callable[..., Any]:
    """What a source exports under this name for tensors of a dtype."""
    return getattr(library, f"{name}_{str(dtype).removeprefix('torch.')}")


def pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p | None:
    """To the first entry; the tensor must live as long as the call that is given it."""
    return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())


def _loaded(source: Path, flags: tuple[str, ...]) -> ctypes.CDLL:
    compiler = shlex.split(os.environ.get("CXX", "")) or [name for name in _COMPILERS if shutil.which(name)][:1]
    if not compiler:
        raise OSError(f"there is no C++ compiler ({' or '.join(_COMPILERS)}; or name one in CXX)")
    instructions = [f"-m{name.replace('_', '').replace('fma3', 'fma')}" for name in AVX512]
    command = [*compiler, *_FLAGS, *instructions, *flags, str(source)]
    texts = [path.read_text(encoding="utf-8") for path in (source, *sorted(source.parent.glob("*.hpp")))]
    key = sha256_of_json([*texts, *command[:-1]])
    path = cache_folder() / f"{source.stem}-{key[:16]}.so"
    with suppress(OSError):  # not there, or damaged
        return _load(path)
    logging.getLogger(__name__).info("compiling %s once (some 3 s)", source.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        subprocess.run(
            [*command, "-o", str(made)], check=True, capture_output=True, text=True, errors="replace", timeout=120
        )
        made.replace(path)  # whole or not there
    return _load(path)


def _load(path: Path) -> ctypes.CDLL:
    found = ctypes.CDLL(str(path))
    _present.add(path.name)
    return found
