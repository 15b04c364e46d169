"""A base's shape from its configuration: the model is built on torch's meta device, where tensors have no data, and so
are its adapters. So the counts are those of a run, whatever the architecture."""

from typing import cast

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from align.base import auto_dtype, find_device, load_model_config
from align.config import AdaptersConfig, BaseModelConfig
from align.errors import ModelError
from align.kernels import cpu, pointwise
from align.lora import lora_config
from align.plan.shape import AdaptedLinear, ModelShape


def read_shape(base: BaseModelConfig, adapters: AdaptersConfig, *, for_gpu: bool = False) -> ModelShape:
    """The shape of the base that a config names. A folder with nothing but a config.json is enough.

    Raises:
        ModelError: it is not found, or is no decoder-only transformer that transformers knows.
        ConfigError: the adapters have no place on it.
    """
    config, device = load_model_config(base), find_device(base)
    # A plan for a GPU may be made where there is none: then auto is what GPUs of today would choose
    auto = torch.bfloat16 if for_gpu and device.type != "cuda" else auto_dtype(device)
    return shape_of(config, adapters, auto_dtype=auto, trust_remote_code=base.trust_remote_code)


def shape_of(
    config: PreTrainedConfig, adapters: AdaptersConfig, *, auto_dtype: torch.dtype, trust_remote_code: bool = False
) -> ModelShape:
    text = config.get_text_config()
    with torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        except (ValueError, KeyError, OSError, RuntimeError, TypeError, AttributeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ModelError(f"base.model: {config.model_type} is no causal LM of transformers: {reason}") from error
        num_parameters = sum(p.numel() for p in model.parameters())
        attention, mlp, is_gated = _matmul_parameters(model, text)
        has_kernels = cpu.has_avx512() and any(
            pointwise.form(module) is pointwise.GatedMLP for module in model.modules()
        )
        adapted, num_frozen_layers = _adapted(model, adapters)
    try:
        num_heads, hidden_size = int(text.num_attention_heads), int(text.hidden_size)
        return ModelShape(
            num_layers=int(text.num_hidden_layers),
            num_frozen_layers=num_frozen_layers,
            hidden_size=hidden_size,
            num_heads=num_heads,
            num_kv_heads=int(getattr(text, "num_key_value_heads", None) or num_heads),
            head_dim=int(getattr(text, "head_dim", None) or hidden_size // num_heads),
            mlp_width=mlp // (int(text.num_hidden_layers) * hidden_size * (3 if is_gated else 2)),
            is_gated=is_gated,
            has_kernels=has_kernels,
            vocabulary=int(text.vocab_size),
            context_length=getattr(text, "max_position_embeddings", None),
            num_parameters=num_parameters,
            num_matmul_parameters=attention + mlp,
            stored_bytes=(getattr(config, "dtype", None) or torch.float32).itemsize,
            auto_bytes=auto_dtype.itemsize,
            adapted=adapted,
        )
    except AttributeError as error:
        raise ModelError(f"base.model: the shape of {config.model_type} cannot be read: {error}") from error


def _matmul_parameters(model: nn.Module, text: PreTrainedConfig) -> tuple[int, int, bool]:
    """What one token is multiplied with in the decoder layers: attention's, the MLP's, and whether that is gated. Of a
    mixture's experts, which stand in tensors of three axes, only the chosen share counts."""
    num_experts = getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None) or 1
    chosen = getattr(text, "num_experts_per_tok", None) or 1
    attention = mlp = 0
    is_gated = False
    for path, parameter in model.named_parameters():
        if parameter.ndim < 2 or not any(part.isdigit() for part in path.split(".")):
            continue
        if "attn" in path or "attention" in path:
            attention += parameter.numel()
        else:
            mlp += parameter.numel() * chosen // num_experts if parameter.ndim == 3 else parameter.numel()
            is_gated |= "gate" in path
    return attention, mlp, is_gated


def _adapted(model: PreTrainedModel, adapters: AdaptersConfig) -> tuple[tuple[AdaptedLinear, ...], int]:
    """Where PEFT puts an adapter, and how many decoder layers lie below. The linear layers of a block (attention, MLP)
    read one tensor, but for its last one."""
    last: dict[str, str] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            last[path.rpartition(".")[0]] = path
    try:
        PeftModel(model, lora_config(model, adapters), adapter_name="plan")  # replaces layers of the model itself
    except ValueError as error:
        raise ModelError(f"base.model: PEFT has no adapters for this base: {error}") from error
    found: list[AdaptedLinear] = []
    reading: set[str] = set()
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer):
            block = path.rpartition(".")[0]
            is_last = last[block] == path
            features = cast(int, module.in_features), cast(int, module.out_features)
            layer = next(int(part) for part in path.split(".") if part.isdigit())
            found.append(AdaptedLinear(*features, layer=layer, shares_input=not is_last and block in reading))
            if not is_last:
                reading.add(block)
    return tuple(found), min(linear.layer for linear in found)
