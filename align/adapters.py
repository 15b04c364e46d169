"""Many roles on one base: the resident model with its named LoRA adapters.

`AdaptedModel.role` is the one way to switch: reference, policy, reward and value are settings of the same weights.
"""

import copy
import json
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import cast

import torch
import xxhash
from peft import LoraConfig, LoraModel, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Cache

from align.attention import has_own_attention
from align.base import Base
from align.config import AdaptersConfig
from align.errors import ArtifactError, InvariantError, ModelError
from align.kernels import row_attention
from align.kernels.few_rows import FEW
from align.layers import DecoderLayers
from align.logprobs import LMHead
from align.lora import LoRALinear, decoder_layers, lora_config, use_lora_product
from align.packing import Packings, last_hidden, longest_packed
from align.randomness import stage_seed

RAW_BASE = "base"  # the role with every adapter off: never the reference (that is the frozen sft adapter)


class AdaptedModel:
    """Owns the resident base and its adapters: which exist, which is active, which trains.

    The base's weights are never changed; `reset` takes all adapters off again.
    """

    def __init__(self, base: Base, adapters: AdaptersConfig) -> None:
        self.base = base
        self._lora = lora_config(base.model, adapters)
        self._peft: PeftModel | None = None
        self._role: tuple[str, bool] = (RAW_BASE, False)
        self._decoder = self._decoder_layers(is_compiled=False)
        self.packings = Packings()  # of what plain layers take
        self.compiled_packings = Packings(stay_packed=True)
        self._list_parameters()
        _verify_trunk_and_head(self)  # against the model's own forward, so not compiled
        if has_own_attention(base.model):
            config = base.model.config.get_text_config()
            longest = partial(longest_packed, self.trunk, config, device=base.device, dtype=base.dtype)
            self.packings = Packings(longest())
            if base.is_compiled:
                at_most = min(longest(stay_packed=True), row_attention.LONGEST)
                self.compiled_packings = Packings(at_most, stay_packed=True)
        if base.is_compiled:
            self._decoder = self._decoder_layers(is_compiled=True)

    def _decoder_layers(self, *, is_compiled: bool) -> DecoderLayers:
        shares_keys = bool(getattr(self.base.model.config.get_text_config(), "num_kv_shared_layers", 0))
        _, layers = decoder_layers(self.base.model)
        return DecoderLayers(self.trunk, list(layers), is_compiled=is_compiled, can_skip=not shares_keys)

    @property
    def base_identity(self) -> str:
        return self.base.resolved.identity

    @property
    def device(self) -> torch.device:
        return self.base.device

    @property
    def hidden_size(self) -> int:
        return int(self.base.model.config.get_text_config().hidden_size)

    @property
    def trunk(self) -> nn.Module:
        """The model without its LM head: ids → last_hidden_state."""
        return getattr(self.base.model, self.base.model.base_model_prefix)

    @property
    def peft(self) -> PeftModel:
        if self._peft is None:
            raise InvariantError("no adapter has been added yet")
        return self._peft

    @property
    def names(self) -> tuple[str, ...]:
        return () if self._peft is None else tuple(sorted(self._peft.peft_config))

    # ---- making, copying, saving adapters ----

    def add(self, name: str, *, seed: int = 0, copy_of: str | None = None) -> None:
        """Add a frozen adapter: a copy of another one, or one that changes nothing yet (B = 0, A drawn from `seed`)."""
        config = copy.deepcopy(self._lora if copy_of is None else cast(LoraConfig, self.peft.peft_config[copy_of]))
        config.inference_mode = False
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stage_seed(seed, name))
            self._attach(name, config)
        if copy_of is not None:
            own, source = self.tensors(name), self.tensors(copy_of)
            for key, tensor in own.items():
                tensor.data.copy_(source[key].data)

    def load(self, name: str, folder: Path) -> None:
        """Add a frozen adapter from a PEFT folder. Raises ArtifactError if it does not fit this base."""
        try:
            config = LoraConfig.from_pretrained(str(folder))
            tensors = load_file(folder / "adapter_model.safetensors")
        except (OSError, ValueError, TypeError, SafetensorError) as error:
            reason = str(error).splitlines()[0]
            raise ArtifactError(f"{folder} is not a LoRA adapter of PEFT (safetensors): {reason}") from None
        if not isinstance(config, LoraConfig):
            raise ArtifactError(f"{folder}: only LoRA adapters are supported, this one is {config.peft_type}")
        of_the_base = ("bias", "modules_to_save", "trainable_token_indices", "layer_replication")
        found = [key for key in of_the_base if getattr(config, key) not in (None, "none", [], {})]
        if found:
            raise ArtifactError(f"{folder}: {found[0]} is set; it would change the base itself, which all roles share")
        if config.init_lora_weights not in (True, False, "gaussian", "orthogonal", "eva"):
            raise ArtifactError(
                f"{folder}: init_lora_weights is {config.init_lora_weights!r}; it would change the base itself, which "
                "all roles share. Save it as a plain LoRA: PEFT's path_initial_model_for_weight_conversion"
            )
        config.inference_mode = False
        try:
            self._attach(name, config)
            outcome = set_peft_model_state_dict(self.peft, tensors, adapter_name=name)
        except (ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise ArtifactError(f"{folder} does not fit the base {self.base.resolved.name}: {reason}") from None
        missing = [key for key in outcome.missing_keys if f".{name}." in key]
        if outcome.unexpected_keys or missing:
            raise ArtifactError(
                f"{folder} does not fit the base {self.base.resolved.name}: {len(outcome.unexpected_keys)} unexpected "
                f"and {len(missing)} missing tensors, first {(*outcome.unexpected_keys, *missing)[0]}"
            )
        inside = {id(module) for layer in self._decoder.layers for module in layer.modules()}
        named = [(key, module) for key, module in self.base.model.named_modules() if isinstance(module, LoraLayer)]
        outside = [key for key, own in named if id(own) not in inside or not isinstance(own, LoRALinear)]
        if outside:  # where no role switches it, and no cache knows of it
            raise ArtifactError(
                f"{folder} adapts {outside[0]}: only linear layers inside decoder layers can carry LoRA"
            )
        self._freeze()

    def save(self, name: str, folder: Path) -> None:
        """Write a PEFT folder, the same bytes for the same weights (PEFT itself lists targets in hash order)."""
        tensors = get_peft_model_state_dict(self.peft, adapter_name=name, save_embedding_layers=False)
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in sorted(tensors.items())}
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config = {**self.peft.peft_config[name].to_dict(), "inference_mode": True}
        config["base_model_name_or_path"] = self.base.resolved.name
        config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
        text = json.dumps(config, indent=1, sort_keys=True, default=str)
        (folder / "adapter_config.json").write_text(text + "\n", encoding="utf-8")

    def reset(self) -> None:
        """Take every adapter off: the base as it was loaded."""
        if self._peft is not None:
            self._peft.unload()
        self._peft = None
        self._role = (RAW_BASE, False)
        self._list_parameters()

    def _attach(self, name: str, config: LoraConfig) -> None:
        if name in self.names:
            raise InvariantError(f"adapter {name} is there already: {self.names}")
        if self._peft is None:
            self._peft = PeftModel(self.base.model, config, adapter_name=name)
        else:
            self._peft.add_adapter(name, config)
        self.peft.eval()  # a new adapter's dropout comes in train mode
        self._list_parameters()
        self._freeze()

    def _list_parameters(self) -> None:
        """Found once for each set of adapters, with whether anything of theirs or of the base's drops out in training:
        a switch of roles happens several times a micro-batch."""
        self._layers: list[LoRALinear] = use_lora_product(self.base.model)
        named = list(self.base.model.named_parameters())
        self._parameters = [(key, parameter, _adapter_of(key, self.names)) for key, parameter in named]
        self._decoder.adapters_changed(self._layers)
        config = self.base.model.config.get_text_config().to_dict()
        rates = [value for key, value in config.items() if "drop" in key and isinstance(value, float)]
        rates += [module.p for module in self.trunk.modules() if isinstance(module, nn.Dropout)]
        self._has_dropout = any(rate > 0 for rate in rates)

    def _freeze(self) -> None:
        self.peft.requires_grad_(False)
        self._apply(*self._role)

    # ---- roles ----

    @contextmanager
    def role(self, name: str, *, train: bool = False) -> Generator[None]:
        """Run as one role: adapter `name` active (or RAW_BASE), its parameters the only ones that require grad, and
        they only if `train`. Roles nest; leaving restores the one before.

        Raises:
            InvariantError: other parameters than expected require grad after the switch.
        """
        before = self._role
        self._apply(name, train)
        try:
            yield
        finally:
            self._apply(*before)

    def _apply(self, name: str, train: bool) -> None:
        self._role = (name, train)
        if self._peft is None:
            if name != RAW_BASE:
                raise InvariantError(f"role {name}: no adapter has been added yet")
            return
        if name != RAW_BASE and name not in self.peft.peft_config:
            raise InvariantError(f"role {name}: there are only the adapters {self.names}")
        # What PEFT's set_adapter and disable_adapter_layers set, without their walks over all modules (which cost as
        # much as a twentieth of a forward pass) and without their flipping requires_grad as they like.
        for layer in self._layers:
            layer._disable_adapters = name == RAW_BASE  # pyright: ignore[reportPrivateUsage]
            if name != RAW_BASE:
                layer._active_adapter = [name]  # pyright: ignore[reportPrivateUsage]
        if name != RAW_BASE:
            self.peft.active_adapter = cast(LoraModel, self.peft.base_model).active_adapter = name
        for _, parameter, adapter in self._parameters:
            parameter.requires_grad = train and adapter == name
        self.verify_trainable()

    def verify_trainable(self) -> None:
        """Check that exactly the present role's parameters require grad. Raises InvariantError naming the others."""
        name, train = self._role
        wrong = [key for key, p, adapter in self._parameters if p.requires_grad != (train and adapter == name)]
        if wrong:
            raise InvariantError(
                f"role {name} (train={train}): requires_grad is wrong for {len(wrong)}, first {wrong[0]}"
            )

    def tensors(self, name: str) -> dict[str, nn.Parameter]:
        """The adapter's parameters under names that do not hold the adapter's own, sorted."""
        found = {key.replace(f".{name}.", "."): parameter for key, parameter, own in self._parameters if own == name}
        return dict(sorted(found.items()))

    # ---- what is computed ----

    def hidden(self, ids_BS: Tensor, is_token_BS: Tensor | None = None, *, is_checkpointed: bool = False) -> Tensor:
        """Last hidden states (B, S, H) in the base's dtype of right-padded sequences, under the present role.

        No mask: a causal model's tokens never look at the padding behind them. What stands at padding is arbitrary.

        Args:
            is_token_BS: bool, False at padding; None if there is none.
            is_checkpointed: keep only each layer's input for the backward pass, and compute the rest again there.
        """
        own = [parameter for _, parameter, adapter in self._parameters if adapter == self._role[0]]
        packings = self.compiled_packings if self.base.is_compiled else self.packings
        return self._decoder.hidden(ids_BS, own, packings.of(ids_BS, is_token_BS), is_checkpointed=is_checkpointed)

    def plain_hidden(self, ids_BS: Tensor, is_token_BS: Tensor, *, cache: Cache | None = None) -> Tensor:
        """As `hidden`, by the layers as trainers and entering prompts have them: not compiled, and checkpointed if a
        trainer says so. An empty `cache` takes the keys and values."""
        # what is drawn for each token would be drawn once for several
        draws = self.trunk.training and self._has_dropout
        packing = None if draws else self.packings.of(ids_BS, is_token_BS)
        return last_hidden(self.trunk, ids_BS, packing, past_key_values=cache, use_cache=cache is not None)

    def step(self, cache: object, windows: Sequence[object], **inputs: Tensor) -> Tensor:
        """Last hidden states (B, 1, H) of one more token of two rows or more, by compiled layers (base.is_compiled)."""
        return self._decoder.step(cache, windows, **inputs)

    @property
    def lm_head(self) -> LMHead:
        return LMHead.of(self.base.model)

    # ---- what must not change ----

    def checksum(self, name: str) -> str:
        """Of every tensor of one adapter."""
        return _checksum(self.tensors(name))

    def base_checksum(self) -> str:
        """Of every tensor of the base, its buffers included, but for those that are no part of its weights' files: some
        architectures make frequencies anew for longer rows."""
        buffers = {
            f"{path}.{name}": buffer
            for path, module in self.base.model.named_modules()
            for name, buffer in module.named_buffers(recurse=False)
            if name not in module._non_persistent_buffers_set  # pyright: ignore[reportPrivateUsage]
        }
        tensors = {**dict(self.base.model.named_parameters()), **buffers}
        # PEFT renames a wrapped layer's own weight; under its first name the sum is the same with and without adapters
        own = {key.replace(".base_layer.", "."): t for key, t in tensors.items() if ".lora_" not in key}
        return _checksum(dict(sorted(own.items())))


def _adapter_of(key: str, adapters: Sequence[str]) -> str | None:
    """Whose a parameter is, by its key: an adapter's, or the base's (None)."""
    return next((name for name in adapters if ".lora_" in key and f".{name}." in key), None)


def _checksum(tensors: "dict[str, nn.Parameter] | dict[str, Tensor]") -> str:
    digest = xxhash.xxh3_128()
    for key, tensor in tensors.items():
        digest.update(key.encode())
        digest.update(tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def _verify_trunk_and_head(model: AdaptedModel) -> None:
    """Our trunk + head must be the model's own forward: an architecture that does more to its logits is refused."""
    # more rows than few, so that both go by the same products
    ids = torch.arange(1, 9, device=model.device).expand(FEW // 8 + 1, 8)
    own = model.base.model(input_ids=ids, use_cache=False).logits.float()
    ours = model.lm_head.logits(model.hidden(ids)).float()
    difference = (own - ours).abs().max().item()
    if not difference <= 1e-3 * own.abs().max().item():
        raise ModelError(
            f"base.model: {type(model.base.model).__name__} does something to its logits that align does not know "
            f"(largest difference {difference:.3g}); this architecture is not supported"
        )
