"""Decoder layers compiled by torch.compile, for the passes of PPO.

Compiled, a layer's norms, activations and sums become a few loops over memory instead of twenty. One graph serves all
layers of a kind and all batch shapes, so compiling takes a minute or so once, and later runs find most of it in
inductor's cache. Trainers and generation, whose shapes and caches would have it compiled again and again, use the plain
layers.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_MAX_GRAPHS = 64  # of one layer: one for each adapter; past it torch goes on uncompiled


class CompiledLayers:
    """Owns the compiled forms of a trunk's decoder layers.

    With and without gradients the same graph runs, the one that learns: two graphs round differently, and then the
    first ratio is not 1. Where nothing is learnt, each layer's graph is cut off and freed at once.
    """

    def __init__(self, trunk: nn.Module) -> None:
        lists = [module for module in trunk.modules() if isinstance(module, nn.ModuleList)]
        self._layers = list(max(lists, key=len))
        torch._dynamo.config.recompile_limit = _MAX_GRAPHS  # pyright: ignore[reportPrivateUsage]
        self._learning = [torch.compile(layer._call_impl, dynamic=True) for layer in self._layers]  # pyright: ignore[reportPrivateUsage]
        self._looking = [_cut_off(compiled) for compiled in self._learning]

    @contextmanager
    def used(self, own: Sequence[nn.Parameter]) -> Generator[None]:
        """While inside, calls of the layers go to their compiled forms. `own`: the present role's parameters."""
        is_learning = torch.is_grad_enabled()
        required = [parameter.requires_grad for parameter in own]
        self._set(self._learning if is_learning else self._looking, own, [True] * len(own))
        try:
            with torch.enable_grad():
                yield
        finally:
            self._set([None] * len(self._layers), own, required)

    def _set(self, forms: Sequence[Any], own: Sequence[nn.Parameter], required: Sequence[bool]) -> None:
        for layer, form in zip(self._layers, forms, strict=True):
            layer._compiled_call_impl = form  # pyright: ignore[reportPrivateUsage]
        for parameter, value in zip(own, required, strict=True):
            parameter.requires_grad = value


def _cut_off(compiled: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        return _detached(compiled(*args, **kwargs))

    return call


def _detached(out: Any) -> Any:
    """Of a layer's output, a tensor or a tuple with it first."""
    if isinstance(out, Tensor):
        return out.detach().requires_grad_()  # as the next layer's input has it when there is something to learn
    return (_detached(out[0]), *out[1:])
