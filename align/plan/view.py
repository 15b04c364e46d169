"""What `align plan` prints: two tables and what to change, or the same as JSON."""

import json
from dataclasses import asdict, fields

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from align.base import find_device
from align.config import Config
from align.lengths import fitted, shortened
from align.plan.fit import USABLE, Change, Device, changes, parse_size
from align.plan.forecast import Plan, forecast
from align.plan.memory import Footprint
from align.show import make_table, print_view

_KINDS = [field.name for field in fields(Footprint)]


def print_plan(config: Config, *, gpus: int, gpu_memory: str | None, as_json: bool) -> bool:
    """Forecast and say it; returns whether it fits, or True if nothing says into what.

    Raises:
        UsageError: the size is none.
        ModelError, ConfigError: the base or its adapters cannot be built.
    """
    memory = None if gpu_memory is None else parse_size(gpu_memory)
    from align.plan.meta import read_shape  # torch, transformers and PEFT: after what can be wrong without them

    asks_for_gpu = memory is not None or gpus > 1 or config.base.device == "cuda"
    on_gpu = asks_for_gpu or find_device(config.base).type == "cuda"
    shape = read_shape(config.base, config.adapters, for_gpu=on_gpu)
    as_run = fitted(config, shape.context_length)
    lengths, config = shortened(config, as_run), as_run
    plan = forecast(config, shape, on_gpu=on_gpu, gpus=gpus)
    found: list[Change] = []
    fits = memory is None or plan.peak() <= USABLE * memory
    if memory is not None and not fits:
        found = changes(config, Device(shape, int(USABLE * memory), gpus))
    device = "GPU" if on_gpu else "CPU"
    if as_json:
        print(json.dumps(_as_json(plan, found, fits=fits, memory=memory, device=device, gpus=gpus), indent=1))
    else:
        room = [Text(f"the base's context: {line}") for line in lengths]
        print_view(Group(_roles(plan, device), _phases(plan), *room, *_verdict(plan, found, memory=memory, gpus=gpus)))
    return fits


def _as_json(
    plan: Plan, found: list[Change], *, fits: bool, memory: int | None, device: str, gpus: int
) -> dict[str, object]:
    return {
        "device": device,
        "gpus": gpus,
        "gpu_memory_bytes": memory,
        "fits": None if memory is None else fits,
        "peak_bytes": plan.peak(),
        "resident_bytes": plan.resident,
        "resident_over_base": plan.resident / plan.roles[0].weights,
        "roles": [asdict(role) for role in plan.roles],
        "phases": [{**asdict(phase), "total_bytes": phase.bytes.total} for phase in plan.phases],
        "changes": [asdict(change) for change in found],
    }


def _roles(plan: Plan, device: str) -> Table:
    unit = _unit(plan)
    table = make_table(f"bytes by role on one {device}, {unit}", "role", "weights", "gradients and moments")
    for role in plan.roles:
        table.add_row(role.name, _size(role.weights, unit), _size(role.training, unit))
    over, training = plan.resident / plan.roles[0].weights, sum(role.training for role in plan.roles)
    table.add_section()
    table.add_row(f"all: {over:.3f} × the base", _size(plan.resident, unit), _size(training, unit))
    return table


def _phases(plan: Plan) -> Table:
    unit = _unit(plan)
    kinds = [kind for kind in _KINDS if any(getattr(phase.bytes, kind) for phase in plan.phases)]
    title = f"bytes by stage and kind, {unit}; TFLOP of an update, of SFT and reward training of a step"
    table = make_table(title, "stage", *kinds, "all", "TFLOP")
    for phase in plan.phases:
        cells = [_size(getattr(phase.bytes, kind), unit) for kind in kinds]
        tera = phase.flops / 1e12
        work = (f"{tera:,.0f}" if tera >= 100 else f"{tera:.3g}") if tera else ""
        style = "bold" if phase.bytes.total == plan.peak() else None
        table.add_row(f"{phase.stage} {phase.name}".strip(), *cells, _size(phase.bytes.total, unit), work, style=style)
    return table


def _verdict(plan: Plan, found: list[Change], *, memory: int | None, gpus: int) -> list[RenderableType]:
    unit = _unit(plan)
    peak = f"peak {_size(plan.peak(), unit)} {unit} at the longest rows"
    lines: list[RenderableType] = []
    if gpus > 1:
        lines.append(
            Text(
                f"{gpus} GPUs: each holds the base and takes 1/{gpus} of rows and episodes. align runs one worker on "
                "one device so far; this is what data-parallel workers would need."
            )
        )
    if memory is None:
        return [*lines, Text(f"{peak}; --gpu-memory 24GB holds it against a GPU's")]
    usable = f"{_size(USABLE * memory, unit)} {unit} usable (a tenth is left to the CUDA context and to gaps)"
    if plan.peak() <= USABLE * memory:
        return [*lines, Text(f"fits: {peak}, {usable}", "green")]
    lines.append(Text(f"does not fit: {peak}, {usable}", "red"))
    if found:
        table = make_table("what to change", "setting", f"peak, {unit}", "fits")
        for change in found:
            table.add_row(" ".join(change.settings), _size(change.peak, unit), "yes" if change.fits else "no")
        lines.append(table)
    if not any(change.fits for change in found):
        lines.append(Text("no change of these settings makes it fit: take a smaller base, or a larger device", "red"))
    return lines


def _unit(plan: Plan) -> str:
    return "GiB" if plan.peak() >= 2**30 else "MiB"


def _size(size: float, unit: str) -> str:
    return f"{size / 2 ** (30 if unit == 'GiB' else 20):,.2f}" if size else ""
