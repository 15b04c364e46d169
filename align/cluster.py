"""Ray: place the one worker, run calls on it, and say in plain words what went wrong."""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.artifacts import write_text
from align.config import BaseModelConfig, ClusterConfig, Config
from align.connection import condense, connect
from align.errors import (
    AlignError,
    OutOfMemoryError,
    PlacementError,
    RewardFunctionError,
    StoppedError,
    StorageError,
    WorkerDiedError,
    WorkerError,
)
from align.messages import last_words
from align.stopping import ask_to_stop
from align.worker import Outcome, StageCall, Worker

_POLL_SECONDS = 0.3
_STOP_SECONDS = 5.0  # that a stage has to save what it has done; with Ray's own end it stays below ten
_DEATH_SECONDS = 2.0
_WITHOUT_A_WORD = " It left no word, as when the system ends what takes too much memory (then dmesg says so)."


@dataclass(frozen=True)
class Resources:
    """Of one machine of the cluster, or what is asked for on one."""

    cpus: int
    gpus: int


def resources_to_ask(cluster: ClusterConfig, base: BaseModelConfig, nodes: Sequence[Resources]) -> Resources:
    """All CPUs of the largest fitting node, and one GPU where there is one, unless the config says otherwise."""
    gpus = cluster.gpus
    if gpus is None:
        has_gpu = any(node.gpus for node in nodes)
        gpus = 1 if base.device == "cuda" or (base.device == "auto" and has_gpu) else 0
    fitting = [node.cpus for node in nodes if node.gpus >= gpus]
    cpus = cluster.cpus or max(fitting or [node.cpus for node in nodes], default=1)
    return Resources(max(cpus, 1), gpus)


def explain_shortage(asked: Resources, nodes: Sequence[Resources], free: Mapping[str, float], *, seconds: float) -> str:
    """Asked for, there is, what to change."""
    left = _as_resources(free)
    there = ", ".join(f"a node with {node.cpus} CPUs and {node.gpus} GPUs" for node in nodes) or "no node"
    message = (
        f"Ray could not place the worker within {seconds:g} s. Asked for: {asked.cpus} CPUs and {asked.gpus} GPUs on "
        f"one node. There is: {there}; free now: {left.cpus} CPUs and {left.gpus} GPUs. "
    )
    if asked.gpus > max((node.gpus for node in nodes), default=0):
        return message + "Change: cluster.gpus=0 base.device=cpu, or a cluster with a GPU."
    most = max((node.cpus for node in nodes if node.gpus >= asked.gpus), default=0)
    if asked.cpus > most:
        return message + f"Change: cluster.cpus={max(most, 1)} or less, or a larger node."
    if left.cpus >= 1 and left.gpus >= asked.gpus:
        return message + f"Others hold the rest. Change: cluster.cpus={left.cpus}, or wait for them."
    return message + "Others hold it: wait for them, or raise cluster.placement_timeout_seconds."


class Cluster:
    """Owns the connection to Ray and the worker; both begin with `start` and end with `close`.

    Args:
        poll: called a few times a second while the worker is busy.
        note: tells the user something.
        again: the command that continues the run, to be named in what to do after a failure.
    """

    def __init__(
        self,
        config: Config,
        *,
        run: Path,
        import_root: Path,
        poll: Callable[[], None],
        note: Callable[[str], None],
        again: str,
    ) -> None:
        self._config = config
        self._run = run
        self._import_root = import_root
        self._poll = poll
        self._note = note
        self._again = again
        self._is_ours = False
        self._group: Any = None
        self._asked = Resources(1, 0)
        self._worker: Any = None
        self._running: Any = None  # what the worker was asked for last
        self._stop: BaseException | None = None  # Ctrl-C or SIGTERM, once heard

    def close(self) -> None:
        if self._worker is None and self._group is None and not self._is_ours:
            return
        import ray
        from ray.util import remove_placement_group

        if ray.is_initialized():
            if self._worker is not None:
                ray.kill(self._worker)
                if self._running is not None:  # until it is dead it may write
                    ray.wait([self._running], timeout=_DEATH_SECONDS)
            if self._group is not None:
                remove_placement_group(self._group)
        if self._is_ours:
            ray.shutdown()

    def start(self) -> None:
        """Connect, place the worker and load the base, unless that is done already.

        Raises:
            PlacementError: there is no Ray, or no room on it.
            WorkerError: there is no memory for the base.
            AlignError: the worker's own, as it was raised there.
        """
        if self._worker is None:
            if self._group is None:
                self._is_ours = connect(self._config.cluster.address)
                self._reserve()
            self._wait_for_place()
            self._worker = self._new_worker()
            try:
                self._wait(self._worker.load.remote(), doing="loading the base model")
            except OutOfMemoryError as error:  # of which smaller micro-batches would change nothing
                raise WorkerError(
                    f"{error}. The base model does not fit: change base.dtype=bfloat16 where the device computes in "
                    "it, take a smaller base.model, or more memory; align plan says what each part takes"
                ) from None

    def drop_worker(self) -> None:
        """Let go of one that has died; its place is kept for the one that `start` will start."""
        import ray

        ray.kill(self._worker)
        self._worker = None

    def run(self, call: StageCall) -> Outcome:
        """Run one stage on the worker.

        Raises:
            AlignError: the stage's own, as it was raised there.
            WorkerDiedError: the worker died.
            WorkerError: it raised something else.
            KeyboardInterrupt, SystemExit: the driver was asked to end; the stage has had a few seconds for that.
        """
        self._running = self._worker.run.remote(call)
        try:
            return self._wait(self._running, doing=call.step)
        except (KeyboardInterrupt, SystemExit) as stop:
            return self._let_stop(self._running, stop, doing=call.step)

    def _let_stop(self, reference: Any, stop: BaseException, *, doing: str) -> Outcome:
        """Give a stage the time to put its last finished update on the disk, or, if it was about done, to end."""
        import ray
        from ray.exceptions import RayError

        try:
            ask_to_stop(self._run)
        except StorageError as why:
            self._note(f"warning: {doing} cannot be asked to stop: {why}")
            raise stop from None
        to_save = "to stop" if doing == "evaluation" else "to save its last update"
        self._note(f"stopping: {doing} has up to {_STOP_SECONDS:g} s {to_save}; a second Ctrl-C ends at once")
        if not ray.wait([reference], timeout=_STOP_SECONDS)[0]:
            self._note(f"warning: {doing} did not come to a place to stop at: what its checkpoints hold is kept")
            raise stop
        try:
            outcome: Any = ray.get(reference)
        except RayError as error:
            cause = getattr(error, "cause", error)
            if not isinstance(cause, StoppedError):
                self._note(
                    f"warning: {doing} failed as it was stopped: {condense(cause)} (all of it: {self._save(error)})"
                )
            raise stop from None
        self._stop = stop
        return outcome

    def end_if_stopped(self) -> None:
        """Raise what `run` heard while a stage was at its end, now that its result is kept."""
        if self._stop is not None:
            raise self._stop

    def _reserve(self) -> None:
        from ray.util import placement_group

        self._asked = asked = resources_to_ask(self._config.cluster, self._config.base, _living_nodes())
        bundle = {"CPU": float(asked.cpus), **({"GPU": float(asked.gpus)} if asked.gpus else {})}
        self._group = placement_group([bundle])

    def _wait_for_place(self) -> None:
        """Also for one that was there: when its node was lost, Ray looks for another."""
        import ray

        seconds = self._config.cluster.placement_timeout_seconds
        deadline = time.monotonic() + seconds
        while not self._group.wait(1):  # no longer: Ctrl-C is not heard in it
            if time.monotonic() < deadline:
                continue
            free = ray.available_resources()
            raise PlacementError(explain_shortage(self._asked, _living_nodes(), free, seconds=seconds))

    def _new_worker(self) -> Any:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        asked = self._asked
        strategy = PlacementGroupSchedulingStrategy(placement_group=self._group)
        actor = ray.remote(Worker).options(
            num_cpus=asked.cpus, num_gpus=asked.gpus, scheduling_strategy=strategy, max_restarts=0
        )
        return actor.remote(
            self._import_root, self._run, self._config.base, self._config.adapters, asked.cpus, asked.gpus
        )

    def _wait(self, reference: Any, *, doing: str) -> Any:
        import ray
        from ray.exceptions import OutOfMemoryError as RayOutOfMemoryError
        from ray.exceptions import RayError, RayTaskError

        while not ray.wait([reference], timeout=_POLL_SECONDS)[0]:
            self._poll()
        self._poll()
        try:
            return ray.get(reference)
        except RayTaskError as error:
            saved = self._save(error)
            cause = error.cause
            if isinstance(cause, RewardFunctionError):
                raise RewardFunctionError(f"{cause} (traceback: {saved})") from None
            if isinstance(cause, AlignError):
                raise cause from None
            raise WorkerError(
                f"{doing} failed in the worker: {type(cause).__name__}: {cause} (traceback: {saved}). Once it is "
                f"mended, continue with: {self._again}"
            ) from None
        except RayError as error:
            saved = self._save(error)
            if isinstance(error, RayOutOfMemoryError):
                raise OutOfMemoryError(f"out of memory in {doing}: {_memory_seen(error)} (Ray: {saved})") from None
            said = last_words(self._run)
            own = f" Its last words: {said}" if said else _WITHOUT_A_WORD
            raise WorkerDiedError(
                f"the worker died ({doing}): {condense(error)}{own} (all that Ray says: {saved})"
            ) from None

    def _save(self, error: Exception) -> str:
        """Where all that Ray says of it is to be read."""
        path, said = self._run / "error.txt", re.sub(r"\x1b\[[0-9;]*m", "", str(error))
        try:
            write_text(path, said + "\n")
        except StorageError as why:  # the error itself counts for more
            return f"not kept: {why}"
        return str(path)


def _living_nodes() -> list[Resources]:
    import ray

    return [_as_resources(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def _as_resources(own: Mapping[str, float]) -> Resources:
    return Resources(cpus=int(own.get("CPU", 0)), gpus=int(own.get("GPU", 0)))


def _memory_seen(error: Exception) -> str:
    """Of the page that Ray's memory monitor writes, how full the node was."""
    found = re.search(r"was (\S+ used / \S+) limit", str(error))
    return f"Ray ended the worker, its node had {found[1]}" if found else condense(error)
