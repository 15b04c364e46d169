"""The worker: a Ray actor, one per device, that holds the one base model through all stages.

Nothing of `data`, torch or transformers is imported before `load` has put our own packages first on the path.
"""

import ctypes
import gc
import os
import resource
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.config import AdaptersConfig, BaseModelConfig
from align.errors import InvariantError, ModelError, OutOfMemoryError
from align.installation import verify_worker
from align.messages import keep_stderr, write_messages

if TYPE_CHECKING:
    from align.adapters import AdaptedModel
    from align.context import StageContext, StageResult
    from align.plan.shape import ModelShape
    from align.results import Vitals

# A stage: (its section of the config, its inputs, the context) -> StageResult
StageFunction = Callable[[Any, Any, "StageContext"], "StageResult"]


@dataclass(frozen=True)
class StageCall:
    """One execution of a stage, as it travels to the worker."""

    step: str
    function: StageFunction
    config: object
    inputs: object
    folder: Path
    run_seed: int
    system_prompt: str | None
    max_reject_rate: float
    resume: bool
    tensorboard: bool
    micro_batch_size: int
    split: int = 1  # parts that a micro-batch is computed in
    command_started: float = 0.0  # seconds since the epoch


@dataclass(frozen=True)
class Outcome:
    result: "StageResult"
    vitals: "Vitals"
    resumed_seconds: float = 0.0  # of an earlier command's work that was kept; part of vitals.seconds, too
    shape: "ModelShape | None" = None  # of the base, for the forecast; None where it cannot be read


class Worker:
    """Args: import_root, the folder that holds the driver's `align`; run, the run's folder; cpus, for torch; gpus, how
    many Ray has given."""

    def __init__(
        self, import_root: Path, run: Path, base: BaseModelConfig, adapters: AdaptersConfig, cpus: int, gpus: int
    ) -> None:
        self._import_root = import_root
        self._run = run
        self._base_config = base
        self._adapters_config = adapters
        self._cpus = cpus
        self._gpus = gpus
        self._model: AdaptedModel | None = None
        self._checksum = ""
        self._shape: ModelShape | None = None
        self._imports_rss_bytes = 0

    def load(self) -> str:
        """Load the base, once. Returns its identity. Not part of __init__, whose errors Ray hides in a string."""
        verify_worker(self._import_root)
        write_messages(self._run, self._import_root)
        keep_stderr(self._run)
        _quiet_libraries()
        wants_gpu = self._gpus > 0 or self._base_config.device == "cuda"
        os.environ["CUDA_VISIBLE_DEVICES"] = _in_sight(os.environ.get("CUDA_VISIBLE_DEVICES"), is_wanted=wants_gpu)
        import torch

        from align.adapters import AdaptedModel
        from align.base import load_base
        from align.slots import verify_decoding

        torch.set_num_threads(self._cpus)
        self._shape = _shape(self._base_config, self._adapters_config)
        self._imports_rss_bytes = _rss_bytes()
        with _lack_of_memory_told("loading the base model"):
            self._model = AdaptedModel(load_base(self._base_config), self._adapters_config)
            verify_decoding(self._model)
        self._checksum = self._model.base_checksum()
        return self._model.base_identity

    def run(self, call: StageCall) -> Outcome:
        """Execute one stage on the resident base, which must be the same afterwards."""
        from align.context import StageContext
        from align.randomness import stage_seed
        from align.tracking import Tracker

        model = self._model
        if model is None:
            raise InvariantError("Worker.run before Worker.load")
        started = time.perf_counter()
        tracker = Tracker(call.folder, stage=call.step, resume=call.resume, tensorboard=call.tensorboard)
        context = StageContext(
            model=model,
            tracker=tracker,
            folder=call.folder,
            seed=stage_seed(call.run_seed, call.step),
            system_prompt=call.system_prompt,
            max_reject_rate=call.max_reject_rate,
            resume=call.resume,
            split=call.split,
        )
        try:
            with _lack_of_memory_told(call.step):
                result = call.function(call.config, call.inputs, context)
        finally:
            tracker.close()
            model.reset()
        checksum = model.base_checksum()
        if checksum != self._checksum:
            raise InvariantError(
                f"{call.step} changed the base model: its checksum was {self._checksum}, now it is {checksum}. "
                "Nothing of this stage is kept; please report it with the config."
            )
        seconds = time.perf_counter() - started + tracker.resumed_seconds()
        dtype = str(model.base.dtype).removeprefix("torch.")
        vitals = _vitals(seconds, dtype, self._imports_rss_bytes, is_on_gpu=model.device.type == "cuda")
        return Outcome(result, vitals, tracker.resumed_seconds(before=call.command_started), self._shape)


def _in_sight(devices: str | None, *, is_wanted: bool) -> str:
    """Of the GPUs that CUDA_VISIBLE_DEVICES names the first, or none: trainers would spread over all in sight, which
    Ray leaves there and others may hold."""
    return ("0" if devices is None else devices.partition(",")[0]) if is_wanted else ""


@contextmanager
def _lack_of_memory_told(doing: str) -> Generator[None]:
    """OutOfMemoryError in place of what torch, CUDA or Python says."""
    from accelerate.utils.memory import should_reduce_batch_size

    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or should_reduce_batch_size(error):
            reason = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
            raise OutOfMemoryError(f"out of memory in {doing}: {reason}") from None
        raise


def _shape(base: BaseModelConfig, adapters: AdaptersConfig) -> "ModelShape | None":
    from align.plan.meta import read_shape

    try:
        return read_shape(base, adapters)
    except ModelError:  # a base that cannot be forecast may still run
        return None


def _rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _vitals(seconds: float, base_dtype: str, imports_rss_bytes: int, *, is_on_gpu: bool) -> "Vitals":
    """Since the step before ended: then the peaks begin anew, and what it freed goes back to the system."""
    import torch

    from align.base import load_count
    from align.results import Vitals

    device_bytes = None
    if is_on_gpu:
        device_bytes = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    vitals = Vitals(
        seconds=seconds,
        peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,  # Linux counts in KiB
        peak_device_memory_bytes=device_bytes,
        base_loads=load_count(),
        base_unchanged=True,  # or `run` has raised
        base_dtype=base_dtype,
        imports_rss_bytes=imports_rss_bytes,
    )
    gc.collect()  # adapters and trainers refer to one another in cycles
    with suppress(AttributeError):  # another C library than GNU's: what it holds on to counts as the next step's
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):  # where the kernel does not let us, the next step's peak is the largest so far
        Path("/proc/self/clear_refs").write_text("5")
    return vitals


def _quiet_libraries() -> None:
    """Their bars and notices would only land in a log file of Ray's; ours go to messages.log."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import datasets
    from transformers.utils import logging as transformers_logging

    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
