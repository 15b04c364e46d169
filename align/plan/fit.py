"""Does it fit, and what to change if not: single settings, each with its new forecast, and several together."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import cast

from align.config import Config
from align.errors import UsageError
from align.plan.forecast import forecast
from align.plan.shape import ModelShape

USABLE = 0.9  # of a device: the rest is left to the CUDA context and to the allocator's gaps
# Below these a change is no advice
_SMALLEST = {
    "max_length": 128,
    "max_prompt_length": 64,
    "max_response_length": 16,
    "ptx_max_length": 128,
    "layers": 4,
    "rank": 4,
}
_UNITS = " KMGT"
Settings = Mapping[str, object]  # by section.key


@dataclass(frozen=True)
class Change:
    settings: tuple[str, ...]  # section.key=value, as overrides
    peak: int  # bytes, with them
    fits: bool


def parse_size(text: str) -> int:
    """Bytes of "24GB" (10⁹) or "24GiB" (2³⁰). UsageError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT])(I?)B", text.strip().upper().replace(" ", ""))
    if match is None or float(match[1]) == 0:
        raise UsageError(f"--gpu-memory {text!r} is no size; write it as 24GB, 24GiB or 40000MB")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** _UNITS.index(match[2]))


@dataclass(frozen=True)
class Device:
    """What a forecast is held against."""

    shape: ModelShape
    usable: int  # bytes
    gpus: int

    def change(self, config: Config, settings: Settings) -> Change:
        config = _with(config, settings)
        layers = config.adapters.layers
        shape = self.shape if layers == "all" else self.shape.with_adapters_on_last(layers)
        peak = forecast(config, shape, on_gpu=True, gpus=self.gpus).peak()
        written = tuple(f"{key}={str(value).lower()}" for key, value in settings.items())
        return Change(written, peak, peak <= self.usable)


def changes(config: Config, device: Device) -> list[Change]:
    """What lowers the peak of a config that does not fit, the gentlest first: one setting at a time, as far as it takes
    to fit, or as far as it goes; and if no single one is enough, the fewest of them together, if these are."""
    found: list[Change] = []
    for key in _keys(config):
        best = device.change(config, {})
        for value in _values(config, key, device.shape):
            change = device.change(config, {key: value})
            best = change if change.peak < best.peak else best
            if best.fits:
                break
        found += [best] if best.settings else []
    if not any(change.fits for change in found):
        found += _together(config, device)
    return found


def _together(config: Config, device: Device) -> list[Change]:
    """Step by step whatever lowers the peak, gentlest first, until it fits; then without what was not needed."""
    settings: Settings = {}
    now = device.change(config, settings)
    while not now.fits:
        for key in _keys(config):
            values = list(_values(_with(config, settings), key, device.shape))
            after = device.change(config, {**settings, key: values[0]}) if values else now
            if after.peak < now.peak:
                settings, now = {**settings, key: values[0]}, after
                break
        else:
            return []
    for key in list(settings):
        fewer = {k: value for k, value in settings.items() if k != key}
        if device.change(config, fewer).fits:
            settings = fewer
    return [device.change(config, settings)]


def _keys(config: Config) -> list[str]:
    """From settings that change no result to those that change it most."""
    stages = config.run.stages
    trainers = [stage for stage in stages if stage != "ppo"]
    exact = [f"{stage}.{name}" for name in ("gradient_checkpointing", "micro_batch_size") for stage in trainers]
    lengths = [f"{stage}.max_length" for stage in trainers]
    critic: list[str] = []
    if "ppo" in stages:
        exact += ["ppo.loss.gradient_checkpointing", "ppo.loss.micro_batch_size"]
        critic = ["ppo.critic.kind"]
    if "ppo" in stages or "reward" in stages:  # which draws answers as PPO will
        exact.append("ppo.rollout.batch_size")
        lengths += ["ppo.rollout.max_response_length", "ppo.rollout.max_prompt_length"]
    if "ppo" in stages and config.ppo.loss.ptx_coefficient:
        lengths.append("ppo.loss.ptx_max_length")
    return [*exact, "base.dtype", *critic, *lengths, "adapters.layers", "adapters.rank"]


def _values(config: Config, key: str, shape: ModelShape) -> Iterator[object]:
    """What to try next: numbers are halved again and again, other settings have one value that takes less."""
    *sections, name = key.split(".")
    value = getattr(reduce(getattr, sections, cast(object, config)), name)
    least = {"gradient_checkpointing": True, "dtype": "bfloat16", "kind": "head"}
    if name in least:
        yield from [] if value == least[name] else [least[name]]
        return
    smallest = _SMALLEST.get(name, 1)
    if name == "max_response_length":
        smallest = max(smallest, config.ppo.rollout.min_response_length)
    value = shape.num_learning_layers if value == "all" else value
    while value > smallest:
        is_divisor = name == "micro_batch_size"  # half of an odd one would leave a rest
        value = 1 if is_divisor and value % 2 else max(value // 2, smallest)
        yield value


def _with(config: Config, settings: Settings) -> Config:
    tree = config.model_dump()
    for key, value in settings.items():
        *sections, name = key.split(".")
        reduce(lambda section, part: section[part], sections, tree)[name] = value
    return Config.model_validate(tree)
