"""The base model: found, identified, loaded once, never changed.

`resolve_base` (no torch) finds the source files and their identity; `load_base` loads them, `load_codec` the tokenizer
alone, `load_model_config` the configuration alone. The embedded model and the tiny random ones are built once into a
cache (`align.embedded`, `align.tiny`).
"""

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from align.artifacts import sha256_of_file, sha256_of_json
from align.config import BaseModelConfig
from align.errors import ModelError
from data.codec import make_codec
from data.tokenization import Codec

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_CONFIG_FILES = ("config.json", "*.py")
_TOKENIZER_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.py")
_MODEL_FILES = (*_TOKENIZER_FILES, "*.safetensors")
_loads = 0  # how often this process has loaded a base: a run must show 1 (summary.json: base.loads)


def load_count() -> int:
    return _loads


@dataclass(frozen=True)
class ResolvedBase:
    name: str
    folder: Path  # holds config.json, *.safetensors and the tokenizer; for the embedded one: its GGUF file
    identity: str  # SHA-256 of the source weight files and config, whatever the dtype


@dataclass(frozen=True)
class Base:
    """A loaded causal LM with its tokenizer. `eos_ids`: any of them stops a response."""

    resolved: ResolvedBase
    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    eos_ids: tuple[int, ...]
    device: "torch.device"
    dtype: "torch.dtype"
    is_compiled: bool = False  # its decoder layers, in the passes of PPO

    @property
    def context_length(self) -> int | None:
        """Tokens of a row that the model has positions for; None if it does not say."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def codec(self, system_prompt: str | None) -> Codec:
        return make_codec(self.tokenizer, eos_ids=self.eos_ids, system_prompt=system_prompt)


def resolve_base(config: BaseModelConfig) -> ResolvedBase:
    """Find the base and its identity, downloading a hub id if it is not in the cache.

    Raises:
        ModelError: nothing is there under this name; says what was looked for.
    """
    if config.model == "embedded":
        from align.embedded import find_embedded

        return ResolvedBase(config.model, *find_embedded())
    folder = _find_folder(config, _MODEL_FILES)
    return ResolvedBase(config.model, folder, _identity(folder))


def _find_folder(config: BaseModelConfig, files: Sequence[str]) -> Path:
    """Where a base that is not the embedded one lies; `files`: what to download of a hub id."""
    if config.model.startswith("tiny:"):
        from align.tiny import find_tiny

        return find_tiny(config.model.removeprefix("tiny:"))
    if Path(config.model).is_dir():
        return Path(config.model)
    verify_hub_id(config.model)
    return _download(config.model, config.revision, files)


def verify_hub_id(model: str) -> None:
    """Of a base that is none of the others. ModelError if it cannot be one."""
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise ModelError(
            f"base.model: {model!r} is not a folder that exists, nor a hub id (owner/name), nor one of "
            "embedded, tiny:llama, tiny:gpt2, tiny:qwen2"
        )


def _download(hub_id: str, revision: str | None, files: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=list(files)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"base.model: {hub_id!r} (revision {revision or 'default'}) is neither a local folder nor could it be had "
            f"from the hub: {type(error).__name__}: {reason}. Check the name, log in for a gated model, or give a "
            "local folder."
        ) from None


def verify_model_folder(folder: Path, *, key: str) -> None:
    """ModelError, which names the setting `key`, if a folder is not there or is no model of transformers."""
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "is no folder that exists"
        raise ModelError(f"{key}: {folder} {what}; give a folder of transformers")
    missing = [name for name in ("config.json", "*.safetensors") if not any(folder.glob(name))]
    if missing:
        raise ModelError(
            f"{key}: {folder} holds no {' and no '.join(missing)}; give a folder of transformers (pickled weights are "
            "not loaded)"
        )


def _identity(folder: Path) -> str:
    verify_model_folder(folder, key="base.model")
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    return sha256_of_json({file.name: sha256_of_file(file) for file in files})


def load_base(config: BaseModelConfig) -> Base:
    """Load the base, frozen and in eval mode, in the dtype and on the device that the config says.

    Raises:
        ModelError: not found, not a decoder-only causal LM, one with more state than keys and values, damaged, or the
            device is not there.
    """
    import torch

    from align.attention import use_own_attention
    from align.kernels import few_rows, pointwise, row_attention
    from align.kernels.products import bound_kernel_caches

    global _loads
    resolved = resolve_base(config)
    folder = resolved.folder
    if config.model == "embedded":
        from align.embedded import convert_embedded

        folder = convert_embedded(resolved.folder, resolved.identity)
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ModelError("base.device: cuda was asked for, and torch sees no CUDA device; use auto or cpu")
    device = find_device(config)
    dtype = auto_dtype(device) if config.dtype == "auto" else getattr(torch, config.dtype)
    if config.trust_remote_code:
        logging.getLogger(__name__).warning(
            "base.trust_remote_code is on: Python code that comes with %s runs on this machine", config.model
        )
    bound_kernel_caches()
    if device.type == "cpu":
        kernels = (few_rows, row_attention, pointwise)
        with ThreadPoolExecutor(len(kernels)) as pool:  # the first time they are compiled, side by side
            list(pool.map(lambda own: own.prepare(), kernels))
    model, tokenizer = _load_whole(folder, config, dtype)
    if getattr(model, "_is_stateful", False):
        raise ModelError(
            f"base.model: {config.model!r} is a {type(model).__name__}, which has state-space or linear-attention "
            "layers; align generates over keys and values alone. Choose a base whose layers all attend."
        )
    _loads += 1
    use_own_attention(model)
    cast("torch.nn.Module", model).to(device).eval().requires_grad_(False)
    if device.type == "cpu":
        pointwise.use_own_pointwise(cast("torch.nn.Module", model))
    eos_ids = _eos_ids(model.config.eos_token_id, model.generation_config.eos_token_id, tokenizer.eos_token_id)
    return Base(resolved, model, tokenizer, eos_ids, device, dtype, config.compile)


def find_device(config: BaseModelConfig) -> "torch.device":
    import torch

    return torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")


def auto_dtype(device: "torch.device") -> "torch.dtype":
    """What `base.dtype: auto` stands for: bfloat16 where products in it are the faster ones, else float32.

    A CPU that only emulates it takes five times as long. AMX computes in it several times as fast as in float32, and so
    do AMD's cores with AVX-512's instructions for it; Intel's, where a virtual machine hides AMX, have the same
    instructions and take 1.5 times as long.
    """
    import torch

    from align.kernels.cpu import is_made_by_amd

    if device.type == "cuda":
        is_faster = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has = torch.cpu.get_capabilities().get
        is_faster = has("amx_bf16") or has("bf16") or (has("avx512_bf16") and is_made_by_amd())
    return torch.bfloat16 if is_faster else torch.float32


def load_codec(config: BaseModelConfig, *, system_prompt: str | None) -> Codec:
    """The codec that `load_base` would give, without the weights: they are neither read nor downloaded.

    Raises:
        ModelError: not found, or its tokenizer or its config cannot be loaded.
    """
    if config.model == "embedded":
        from align.embedded import convert_embedded, find_embedded

        folder = convert_embedded(*find_embedded())
    else:
        folder = _find_folder(config, _TOKENIZER_FILES)
    # AutoTokenizer itself imports torch; a class of tokenizer chosen here instead could split text otherwise
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    trust = config.trust_remote_code
    try:
        tokenizer = cast("PreTrainedTokenizerBase", AutoTokenizer.from_pretrained(folder, trust_remote_code=trust))
        configs = [AutoConfig.from_pretrained(folder, trust_remote_code=trust)]
        if (folder / "generation_config.json").is_file():
            configs.append(GenerationConfig.from_pretrained(folder))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise _unloadable(config, folder, error) from error
    eos_ids = _eos_ids(*(each.eos_token_id for each in configs), tokenizer.eos_token_id)
    return make_codec(tokenizer, eos_ids=eos_ids, system_prompt=system_prompt)


def load_model_config(config: BaseModelConfig) -> "PreTrainedConfig":
    """The base's own configuration alone: no weights need be there, and of a hub id none are downloaded.

    Raises:
        ModelError: not found, or not a model of transformers.
    """
    from transformers import AutoConfig

    options: dict[str, str] = {}
    if config.model == "embedded":
        from align.embedded import converted_folder, find_embedded

        gguf, identity = find_embedded()
        folder = converted_folder(identity)
        if not (folder / "config.json").is_file():  # not converted yet: out of the GGUF file, which takes 5 s
            folder, options = gguf.parent, {"gguf_file": gguf.name}
    else:
        folder = _find_folder(config, _CONFIG_FILES)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code, **options)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise _unloadable(config, folder, error) from error


def _load_whole(
    folder: Path, config: BaseModelConfig, dtype: "torch.dtype"
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """What transformers makes of the folder; refused if it would have to invent weights."""
    from accelerate.utils.memory import should_reduce_batch_size
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trust = config.trust_remote_code
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
        model, info = cast(
            "tuple[PreTrainedModel, dict[str, list[str]]]",
            AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, trust_remote_code=trust, use_safetensors=True, output_loading_info=True
            ),
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if should_reduce_batch_size(error):
            raise  # memory, not the model
        raise _unloadable(config, folder, error) from error
    if info["missing_keys"]:  # transformers would go on with random weights
        raise ModelError(
            f"base.model: the weights in {folder} are not whole: {len(info['missing_keys'])} tensors are "
            f"missing, first {min(info['missing_keys'])}"
        )
    return model, tokenizer


def _unloadable(config: BaseModelConfig, folder: Path, error: Exception) -> ModelError:
    reason = str(error).strip().splitlines()[0]
    return ModelError(
        f"base.model: {config.model!r} cannot be loaded from {folder}: {type(error).__name__}: {reason}. It must "
        "be a decoder-only causal LM of transformers with its tokenizer beside it."
    )


def _eos_ids(*values: object) -> tuple[int, ...]:
    """All that the model's config, its generation config and its tokenizer name."""
    found: set[int] = set()
    for value in values:
        if isinstance(value, int):
            found.add(value)
        elif value is not None:
            found.update(int(item) for item in cast("list[int]", value))
    if not found:
        raise ModelError("base.model: neither its config nor its tokenizer names an EOS token; answers could not end")
    return tuple(sorted(found))
