"""LoRA: which layers carry it, and its product, y = x Wᵀ + b + s (x Aᵀ) Bᵀ, as one step of autograd.

PEFT computes it from separate layers: the low-rank result, its scaled copy and the sum each pass over the activations
once more, forwards and backwards, and under a bfloat16 base the input is copied into the adapter's float32. Here the
low-rank part is added into the product itself, in the base's dtype, and what is kept for the backward pass is x (which
q, k and v share) and the rank-r x Aᵀ. A and B, and their gradients, stay float32.

Few rows, as in decoding, have a product of their own (`align.kernels.few_rows`); where that is not to be had, or left
to torch, and decoding is compiled, their low-rank part is loops.
"""

from typing import Any, cast

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from align.config import AdaptersConfig
from align.errors import ConfigError, ModelError
from align.kernels import few_rows
from align.kernels.products import add_product, frozen_linear, frozen_product

_LOOPED_ROWS = {torch.float32: 32, torch.bfloat16: 64}  # of compiled decoding, at most; past it products are faster


class LoRALinear(PeftLinear):
    """PEFT's layer with another forward. What is not plain LoRA, or has dropout at work, is left to PEFT's own."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        active = [name for name in self.active_adapters if name in self.lora_A]
        base = cast(nn.Linear, self.base_layer)
        weight_OI = base.weight.t() if isinstance(base, Conv1D) else base.weight
        if self.disable_adapters or not active:
            return frozen_linear(x, weight_OI, base.bias)
        name = active[0]
        if len(active) > 1 or args or kwargs or not self._is_plain(name):
            return super().forward(x, *args, **kwargs)
        low, high = cast(nn.Linear, self.lora_A[name]), cast(nn.Linear, self.lora_B[name])
        a_RI, b_OR, scale = low.weight, high.weight, self.scaling[name]
        if torch.is_grad_enabled():
            return _LoRAProduct.apply(x, weight_OI, base.bias, a_RI, b_OR, scale)
        x_NI = x.reshape(-1, x.shape[-1])
        is_looped = x.device.type == "cpu" and len(x_NI) <= _LOOPED_ROWS.get(x.dtype, 0)
        if torch.compiler.is_compiling() and is_looped and not few_rows.fits(x_NI, weight_OI):
            y_NO = _looped_product(x_NI, weight_OI, base.bias, a_RI, b_OR, scale)
        else:
            y_NO, _ = _product(x_NI, weight_OI, base.bias, a_RI, b_OR, scale)
        return y_NO.view(*x.shape[:-1], -1)

    def _is_plain(self, name: str) -> bool:
        has_dropout = self.training and not isinstance(self.lora_dropout[name], nn.Identity)
        return not (self.merged or has_dropout or name in self.lora_variant or self.lora_bias[name])


def use_lora_product(model: nn.Module) -> list[LoRALinear]:
    """Give every LoRA layer of PEFT's the forward above; returns them all."""
    for module in model.modules():
        if type(module) is PeftLinear:
            module.__class__ = LoRALinear
    return [module for module in model.modules() if isinstance(module, LoRALinear)]


def lora_config(model: nn.Module, adapters: AdaptersConfig) -> LoraConfig:
    path, decoder = decoder_layers(model)
    linear = {key: name for key, module in decoder.named_modules() if (name := _linear_name(key, module))}
    names = sorted(set(linear.values()))
    if not names:
        raise ModelError("base.model: no linear layers inside its decoder layers were found; LoRA has no place")
    chosen = names
    if isinstance(adapters.targets, tuple):
        chosen = sorted(n for n in names if n in adapters.targets or n.split(".")[-1] in adapters.targets)
        unknown = [t for t in adapters.targets if not any(t in (n, n.split(".")[-1]) for n in names)]
        if unknown:
            raise ConfigError(f"adapters.targets: {unknown[0]!r} is no linear layer of this base; it has {names}")
    elif adapters.targets != "all-linear":
        chosen = [n for n in names if ("attn" in n or "attention" in n) == (adapters.targets == "attention")]
    if not chosen:
        raise ConfigError(f"adapters.targets: {adapters.targets} fits no linear layer of this base; it has {names}")
    layers = None
    if adapters.layers != "all":
        if adapters.layers > len(decoder):
            raise ConfigError(f"adapters.layers: {adapters.layers}, but this base has {len(decoder)} decoder layers")
        layers = list(range(len(decoder) - adapters.layers, len(decoder)))
    others = [key for key, module in model.named_modules() if not key.startswith(f"{path}.") and _is_linear(module)]
    if any(f".{key}".endswith(f".{name}") for key in others for name in chosen):  # as in a tower for images: not there
        numbers = range(len(decoder)) if layers is None else layers
        wanted = {key for key, name in linear.items() if name in chosen and int(key.partition(".")[0]) in numbers}
        chosen, layers = [f"{path}.{key}" for key in wanted], None
    return LoraConfig(
        r=adapters.rank,
        lora_alpha=adapters.alpha,  # type: ignore[arg-type]
        lora_dropout=adapters.dropout,
        target_modules=sorted(chosen),
        layers_to_transform=layers,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        task_type="CAUSAL_LM",
    )


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The layers of the text decoder, and where they lie in the model, which may hold other towers. ModelError if there
    are none."""
    decoder = cast(PreTrainedModel, model).get_decoder()
    lists = [module for module in decoder.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ModelError("base.model: no list of decoder layers was found; LoRA has no place")
    layers = max(lists, key=len)
    return next(path for path, module in model.named_modules() if module is layers), layers


def _linear_name(key: str, module: nn.Module) -> str | None:
    """Of a linear layer in a list of layers, the last two of its names: "self_attn.q_proj" of "3.self_attn.q_proj"."""
    return ".".join(key.split(".")[1:][-2:]) if _is_linear(module) else None


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def _product(
    x_NI: Tensor, weight_OI: Tensor, bias: Tensor | None, a_RI: Tensor, b_OR: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """y (N, O) in the dtype of x, and x Aᵀ (N, R) in that or in float32."""
    if few_rows.fits(x_NI, weight_OI):
        return few_rows.product(x_NI, weight_OI, bias, a_RI, b_OR, scale)
    y_NO = frozen_product(x_NI, weight_OI, bias)
    low_NR = torch.mm(x_NI, a_RI.to(x_NI.dtype).t())
    return add_product(y_NO, low_NR, b_OR.to(x_NI.dtype).t(), scale), low_NR


def _looped_product(
    x_NI: Tensor, weight_OI: Tensor, bias: Tensor | None, a_RI: Tensor, b_OR: Tensor, scale: float
) -> Tensor:
    """y (N, O); a compiler makes loops of the sums over i and r, in the layout of the product with the weight first."""
    x_IN = x_NI.t()
    low_RN = (a_RI[:, :, None] * x_IN).sum(1)
    y_ON = torch.mm(weight_OI, x_IN) + scale * (b_OR[:, :, None] * low_RN).sum(1)
    return (y_ON if bias is None else y_ON + bias[:, None]).t().to(x_NI.dtype)


class _LoRAProduct(torch.autograd.Function):
    """W and b are frozen, whatever they say. dx = g W + s (g B) A; dA = s (g B)ᵀ x; dB = s gᵀ (x Aᵀ)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_OI: Tensor, bias: Tensor | None, a_RI: Tensor, b_OR: Tensor, scale: float
    ) -> Tensor:
        x_NI = x.reshape(-1, x.shape[-1])
        y_NO, low_NR = _product(x_NI, weight_OI, bias, a_RI, b_OR, scale)
        ctx.save_for_backward(x_NI, low_NR.to(x_NI.dtype), weight_OI, a_RI, b_OR)
        ctx.scale = scale
        return y_NO.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable  # it has no types, so pyright misses the name of ctx
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_NI, low_NR, weight_OI, a_RI, b_OR = ctx.saved_tensors
        gradient = gradients[0]
        g_NO = gradient.reshape(-1, gradient.shape[-1])
        low_g_NR = torch.mm(g_NO, b_OR.to(g_NO.dtype))
        dx = da_RI = db_OR = None
        if ctx.needs_input_grad[0]:
            dx_NI = add_product(frozen_product(g_NO, weight_OI.t()), low_g_NR, a_RI.to(g_NO.dtype), ctx.scale)
            dx = dx_NI.view(*gradient.shape[:-1], -1)
        if ctx.needs_input_grad[3]:
            da_RI = torch.mm(low_g_NR.t(), x_NI).to(a_RI.dtype).mul_(ctx.scale)
        if ctx.needs_input_grad[4]:
            # the other way round: with R rows the product runs almost twice as fast as with R columns;
            # and back in B's own layout, or autograd would copy it once more
            db_OR = torch.mm(low_NR.t(), g_NO).t().to(b_OR.dtype).mul(ctx.scale).contiguous()
        return dx, None, None, da_RI, db_OR, None
