"""How the passes of PPO call the decoder layers: plain, compiled, checkpointed, or not at all.

All of it is a form that a layer's call takes while a pass runs; trainers and entering prompts see the plain layers.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch.utils.checkpoint import checkpoint
from torch.utils.weak import WeakIdKeyDictionary

from align.packing import PackedRows, last_hidden, packed_again

_MAX_GRAPHS = 64  # of one compiled layer: one for each adapter; past it torch goes on uncompiled
_Call = Callable[..., Any]


class DecoderLayers:
    """Owns the forms of a trunk's decoder layers, and what the layers below all adapters said.

    Compiled (torch.compile), a layer's norms, activations and sums become a few loops over memory instead of twenty.
    One graph serves all layers and batch shapes; compiling takes a minute or so once, and later runs find most of it
    in inductor's cache. The graph that learns runs without gradients too: two graphs round differently, and then the
    first ratio is not 1. Each layer's part of it is then cut off and freed at once. Decoding has a graph of its own.

    Layers below the first that carries an adapter say the same in every role and epoch. What the last of them said of
    a batch is kept as long as the tensor of its ids lives, and the next pass over it begins there; unless upper layers
    take more of them than that, as keys and values are in Gemma 3n (`can_skip` False).
    """

    def __init__(
        self, trunk: nn.Module, layers: Sequence[nn.Module], *, is_compiled: bool, can_skip: bool = True
    ) -> None:
        self.layers = layers
        self._trunk = trunk
        self._can_skip = can_skip
        self._num_frozen = 0
        self._said: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._calls: list[_Call] = [layer._call_impl for layer in self.layers]  # pyright: ignore[reportPrivateUsage]
        self._is_compiled = is_compiled
        if is_compiled:
            torch._dynamo.config.recompile_limit = _MAX_GRAPHS  # pyright: ignore[reportPrivateUsage]
            _keep_compiler_right()
            self._calls = [torch.compile(call, dynamic=True) for call in self._calls]

    def adapters_changed(self, adapted: Sequence[nn.Module]) -> None:
        """`adapted`: every module that carries an adapter now, in any layer."""
        carrying = {id(module) for module in adapted}
        has_adapter = [any(id(module) in carrying for module in layer.modules()) for layer in self.layers]
        self._num_frozen = has_adapter.index(True) if True in has_adapter and self._can_skip else 0
        self._said.clear()

    def hidden(
        self, ids_BS: Tensor, own: Sequence[nn.Parameter], packing: PackedRows | None, *, is_checkpointed: bool
    ) -> Tensor:
        """The trunk's last hidden states (B, S, H); `own` are the present role's parameters."""
        is_learning = torch.is_grad_enabled()
        forms = self._calls
        if is_learning and is_checkpointed:
            forms = [partial(checkpoint, call, use_reentrant=False, context_fn=packed_again) for call in forms]
        elif self._is_compiled and not is_learning:
            forms = [partial(_cut_off, call) for call in forms]
        below = slice(self._num_frozen)
        said = self._said.get(ids_BS)
        if said is not None:
            forms = [partial(_repeat, said)] * self._num_frozen + forms[self._num_frozen :]
        elif self._num_frozen:
            last = partial(self._remember, ids_BS, self._calls[below][-1])
            forms = [*self._calls[below][:-1], last, *forms[self._num_frozen :]]
        with self._called_as(forms), _as_if_learning(own, is_forced=self._is_compiled):
            hidden_BSH = last_hidden(self._trunk, ids_BS, packing, use_cache=False)
        return hidden_BSH if is_learning else hidden_BSH.detach()

    def step(self, cache: object, windows: Sequence[object], **inputs: Any) -> Tensor:
        """The trunk's last hidden states (B, 1, H) of one more token a row, compiled. In place of the cache each layer
        finds its own of `windows`: tensors alone, so that neither a layer's number nor a column makes another graph."""
        forms = [partial(_with, window, cache, call) for window, call in zip(windows, self._calls, strict=True)]
        with self._called_as(forms):
            return self._trunk(past_key_values=cache, use_cache=True, **inputs).last_hidden_state

    def _remember(self, ids_BS: Tensor, call: _Call, *args: Any, **kwargs: Any) -> Any:
        self._said[ids_BS] = call(*args, **kwargs)
        return self._said[ids_BS]

    @contextmanager
    def _called_as(self, forms: Sequence[_Call]) -> Generator[None]:
        for layer, form in zip(self.layers, forms, strict=True):
            layer._compiled_call_impl = form  # pyright: ignore[reportPrivateUsage]
        try:
            yield
        finally:
            for layer in self.layers:
                layer._compiled_call_impl = None  # pyright: ignore[reportPrivateUsage]


def _keep_compiler_right() -> None:
    """g++ 12 makes wrong numbers, even infinities, of some bfloat16 loops that transpose a tile, when it packs straight
    code into vectors (-O3). Inductor's loops are vectors already, so nothing is lost without. Inductor has no setting
    for options of the compiler, but the text of this one goes to it as it is."""
    option = " -fno-tree-slp-vectorize"
    if not inductor_config.cpp.enable_floating_point_contract_flag.endswith(option):
        inductor_config.cpp.enable_floating_point_contract_flag += option


@contextmanager
def _as_if_learning(own: Sequence[nn.Parameter], *, is_forced: bool) -> Generator[None]:
    """A graph is compiled for what requires grad: with `is_forced` the same does, whether or not there is to be one."""
    if not is_forced:
        yield
        return
    required = [parameter.requires_grad for parameter in own]
    for parameter in own:
        parameter.requires_grad = True
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter, value in zip(own, required, strict=True):
            parameter.requires_grad = value


def _repeat(said: Any, *_: Any, **__: Any) -> Any:
    return said


def _with(window: object, cache: object, call: _Call, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The call with the window wherever it was given the cache. What a compiled layer says (B, 1, H) may lie in memory
    otherwise than embeddings do, in the strides of its one token as well: that would make another graph."""
    own = [window if value is cache else value for value in args]
    return call(
        hidden[:, -1].contiguous()[:, None],
        *own,
        **{key: window if value is cache else value for key, value in kwargs.items()},
    )


def _cut_off(call: _Call, *args: Any, **kwargs: Any) -> Any:
    return _detached(call(*args, **kwargs))


def _detached(out: Any) -> Any:
    """Of a layer's output, a tensor or a tuple with it first."""
    if isinstance(out, Tensor):
        return out.detach().requires_grad_()  # as the next layer's input has it when there is something to learn
    return (_detached(out[0]), *out[1:])
