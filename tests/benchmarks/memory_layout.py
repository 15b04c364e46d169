"""One layout's PPO for memory, in a process of its own: python -m tests.benchmarks.memory_layout JOB.

The stage function itself, as in ppo-update. Bytes are counted when its last update ends and everything is still alive:
every tensor that Python's garbage collector knows, by its storage, so that views and tied weights count once and a
copy in some corner counts again. What it cannot see, a copy inside a library, would stand in the resident memory.
"""

import ctypes
import gc
import json
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from align.adapters import AdaptedModel
from align.rewards import REWARD
from align.tracking import Tracker
from stages.ppo.rollout import REFERENCE, VALUE
from tests.benchmarks.memory_copies import SeparateCopies
from tests.benchmarks.ppo_update_ours import load_model, run_task
from tests.benchmarks.ppo_update_task import Job, read_job
from tests.benchmarks.process_tree import resident_bytes

# Who gets a copy of its own first: the critic, which is trained; then the reward model, which others often serve from
# elsewhere; last the reference, which most get by switching the policy's adapter off.
HOMES = ((VALUE, 1), (REWARD, 2), (REFERENCE, 3))


@dataclass(frozen=True)
class Counts:
    """Bytes of distinct storages."""

    modules: int  # parameters and buffers of every module alive
    optimizer: int
    others: int  # any tensor else
    resident: int  # of the process, what malloc keeps for itself given back first
    peak: int


@dataclass(frozen=True)
class Report:
    counts: Counts
    imports_bytes: int  # resident once everything was imported, and nothing loaded


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes by address."""
    found = (t.untyped_storage() for t in tensors if t.device.type != "meta" and t.layout == torch.strided)
    return {storage.data_ptr(): storage.nbytes() for storage in found if storage.nbytes()}


def count() -> Counts:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what freed activations leave behind would look like a copy
    resident, peak = resident_bytes(os.getpid())
    objects = gc.get_objects()
    # type(), not isinstance(): that would wake lazily imported modules. A compiler's fake tensors hold no bytes.
    kinds = ((o, type(o)) for o in objects)
    tensors = storages(o for o, kind in kinds if issubclass(kind, Tensor) and not issubclass(kind, FakeTensor))
    modules = [o for o in objects if issubclass(type(o), nn.Module)]
    own = storages(t for m in modules for t in (*m.parameters(recurse=False), *m.buffers(recurse=False)))
    optimizers = [o for o in objects if issubclass(type(o), torch.optim.Optimizer)]
    states = [value for o in optimizers for state in o.state.values() for value in state.values()]
    trained = storages(value for value in states if isinstance(value, Tensor))
    others = sum(size for address, size in tensors.items() if address not in own and address not in trained)
    return Counts(sum(own.values()), sum(trained.values()), others, resident, peak)


class _Counting(Tracker):
    """Counts when an update's times are logged: nothing of it has been freed."""

    counts: Counts

    def log_timing(self, step: int, values: Mapping[str, float]) -> None:
        super().log_timing(step, values)
        self.counts = count()


def load(job: Job, copies: int) -> AdaptedModel:
    if copies == 1:
        return load_model(job)
    return SeparateCopies([load_model(job) for _ in range(copies)], dict(HOMES[: copies - 1]))


def main(path: Path) -> None:
    imports_bytes, _ = resident_bytes(os.getpid())
    job, folder = read_job(path)
    copies = json.loads((folder / "copies.json").read_text(encoding="utf-8"))
    tracker = _Counting(folder / "ppo", stage="ppo")
    run_task(job, folder / "ppo", load(job, copies), tracker)
    report = asdict(Report(tracker.counts, imports_bytes))
    (folder / "memory.json").write_text(json.dumps(report), encoding="utf-8")


def read_report(folder: Path) -> Report:
    fields = json.loads((folder / "memory.json").read_text(encoding="utf-8"))
    return Report(Counts(**fields["counts"]), fields["imports_bytes"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
