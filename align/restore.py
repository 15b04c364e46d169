"""Lend the resident model to a trainer and get it back as it was.

Trainers change the model that they are given: TRL's SFTTrainer wraps forward, turns on checkpointing and an
input-grad hook, sets use_cache and train mode; its RewardTrainer sets every adapter's dropout to 0 for good.
"""

import copy
import random
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
)
# What is instance state of a module but not its parameters, buffers, children and hooks: wrapped forwards,
# checkpointing flags and functions, saved originals.
_OWN = ("_parameters", "_buffers", "_modules", *_HOOKS)


@dataclass(frozen=True)
class ModelState:
    """All that a trainer can change besides the weights; equal states compare equal."""

    modules: dict[str, dict[str, object]]  # instance attributes of every module, dropout p and training among them
    hooks: dict[str, dict[str, dict[object, object]]]
    requires_grad: dict[str, bool]
    configs: dict[str, dict[str, object]]  # of every config object on the model, use_cache among them


def snapshot(model: nn.Module) -> ModelState:
    modules, hooks, configs = {}, {}, {}
    for path, module in model.named_modules():
        modules[path] = {key: value for key, value in module.__dict__.items() if key not in _OWN}
        hooks[path] = {key: dict(module.__dict__[key]) for key in _HOOKS}
        for key in ("config", "generation_config"):
            if hasattr(module.__dict__.get(key), "to_dict"):
                configs[f"{path}.{key}"] = copy.deepcopy(module.__dict__[key].__dict__)
    return ModelState(modules, hooks, {key: p.requires_grad for key, p in model.named_parameters()}, configs)


def restore(model: nn.Module, state: ModelState) -> None:
    for path, module in model.named_modules():
        saved = state.modules[path]
        for key in [key for key in module.__dict__ if key not in _OWN and key not in saved]:
            del module.__dict__[key]
        module.__dict__.update(saved)
        for key in _HOOKS:
            module.__dict__[key].clear()
            module.__dict__[key].update(state.hooks[path][key])
        for key in ("config", "generation_config"):
            if f"{path}.{key}" in state.configs:
                own = module.__dict__[key].__dict__
                own.clear()
                own.update(copy.deepcopy(state.configs[f"{path}.{key}"]))
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(state.requires_grad[key])
        parameter.grad = None


@contextmanager
def lent(model: nn.Module) -> Generator[None]:
    """While inside, a trainer may do with the model as it likes; afterwards all but the trained weights is as before.

    The global random states are put back too: trainers seed them.
    """
    state = snapshot(model)
    of_python, of_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            restore(model, state)
            random.setstate(of_python)
            np.random.set_state(of_numpy)
