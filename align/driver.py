"""The driver: reads the data, decides step by step what is to be done, and has the worker do it."""

import time
from collections.abc import Callable, Generator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from align.artifacts import newest_whole, write_json, write_text
from align.base import resolve_base
from align.cluster import Cluster
from align.config import Config
from align.connection import is_in_ray_job
from align.errors import (
    AlignError,
    OutOfMemoryError,
    StoppedError,
    TerminatedError,
    UsageError,
    WorkerDiedError,
)
from align.handover import Handover, StageInputs, artifacts_of
from align.installation import import_root, verify_current_folder
from align.intake import StageData, keep_rejects, parts_of_step, read_stage_data
from align.lengths import context_length_in, fitted
from align.messages import MessageReader
from align.out_of_memory import micro_batch_size, next_split, to_need_less
from align.pipeline import (
    STEPS,
    Decision,
    Fingerprint,
    RunCall,
    StepName,
    decide,
    fingerprint,
    refuse_unfinished,
    stage_of,
    stale,
    steps_to_do,
    verify_allowed,
)
from align.plan.forecast import forecast
from align.results import FinishedStep, begin, read_finished, write_finished
from align.settings import dump
from align.show import Display
from align.sources import source_identities
from align.status import Status, occupied, read_status, write_end
from align.stopping import heard_signals
from align.summary import Journal
from align.worker import Outcome, StageCall, StageFunction


@dataclass(frozen=True)
class Prepared:
    """What one step would run on."""

    inputs: StageInputs
    data: StageData
    fingerprint: Fingerprint


def run_pipeline(
    config: Config,
    call: RunCall,
    *,
    stages: Mapping[str, StageFunction],
    display: Display,
) -> dict[str, object]:
    """Run what has to run, and return the summary.

    Args:
        stages: each step's function, "evaluation" among them.

    Raises:
        AlignError: one message; its exit_code tells a wrong call from a failed run.
    """
    started, steps = time.time(), steps_to_do(config, call.stage)
    verify_allowed(call.allowed, config, steps)
    run, again = run_folder(config), call.again
    verify_current_folder()
    with occupied(run), _said_if_stopped(run, again), heard_signals(partial(_give_up, run, display, again)):
        if not (call.resume or call.fresh or is_in_ray_job()):  # a job submitted again goes on: nobody is there to ask
            for step in steps:
                refuse_unfinished(run / step, call)
        # Here, or a missing source would only be told after SFT and reward training
        sources = source_identities(config.ppo.rewards) if "ppo" in steps else {}
        base = resolve_base(config.base)
        fitted(config, context_length_in(base.folder))  # or a response without room would be told after SFT
        base_identity = base.identity
        data = {name: read_stage_data(config, name, run, display.note) for name in config.run.stages if name in steps}
        handover = Handover(config, run, base_identity, call.command)
        journal = Journal(config, run, base_identity)
        watch = Watch(run, display)
        cluster = Cluster(config, run=run, import_root=import_root(), poll=watch.poll, note=display.note, again=again)
        with closing(cluster):
            for step in steps:
                stage_data = data[stage_of(step)]
                inputs = handover.inputs(step, stage_data)
                prepared = prepare(step, config, stage_data, inputs, sources, base_identity=base_identity)
                decision = decide(step, run / step, prepared.fingerprint, call)
                if step == steps[0]:
                    warn_of_stale(config, steps[0], run=run, base_identity=base_identity, display=display)
                display.step(step, f"{decision.kind} ({decision.reason})")
                if decision.finished is None:
                    write_text(run / "config.yaml", dump(config))  # not before: a refused command leaves what is there
                    stage_call = call_of(step, stages[step], config, prepared, run, decision, command_started=started)
                    is_kept = decision.kind == "resume"
                    start = partial(begin_step, run / step, prepared, keep=is_kept, changed=decision.changed)
                    watch.start(step)
                    outcome = run_to_its_end(cluster, stage_call, start, config.cluster.max_failures, display, again)
                    write_finished(run / step, finish(step, outcome, prepared, config))
                    journal.count(step, outcome)
                journal.record(step)
                cluster.end_if_stopped()
            write_text(run / "config.yaml", dump(config))
        return journal.summary


def run_folder(config: Config) -> Path:
    """The run's folder, absolute. UsageError if it would vanish with a Ray job's package."""
    if is_in_ray_job() and not config.run.root.is_absolute():
        raise UsageError(
            f"run.root is {str(config.run.root)!r}, relative to the folder of this Ray job's package, which Ray "
            "deletes after the job: everything would be lost. Give a place that stays: run.root=/absolute/path"
        )
    return config.run.folder.absolute()


def prepare(
    step: StepName,
    config: Config,
    data: StageData,
    inputs: StageInputs,
    sources: Mapping[str, str],
    *,
    base_identity: str,
) -> Prepared:
    hashes = {name: artifact and artifact.content_hash for name, artifact in artifacts_of(inputs).items()}
    if step in ("ppo", "evaluation"):
        hashes |= {f"source.{name}": identity for name, identity in sources.items()}
    parts = parts_of_step(step, data, has_guard=config.ppo.guard.every is not None)
    return Prepared(inputs, data, fingerprint(step, config, base_identity=base_identity, data=parts, inputs=hashes))


def begin_step(folder: Path, prepared: Prepared, *, keep: bool, changed: str) -> None:
    begin(folder, prepared.fingerprint, keep=keep, changed=changed)
    if folder.name != "evaluation":  # whose data is that of ppo
        keep_rejects(folder, prepared.data.rejects)


def call_of(
    step: StepName,
    function: StageFunction,
    config: Config,
    prepared: Prepared,
    run: Path,
    decision: Decision,
    *,
    command_started: float,
) -> StageCall:
    return StageCall(
        step=step,
        function=function,
        config=getattr(config, step),
        inputs=prepared.inputs,
        folder=run / step,
        run_seed=config.run.seed,
        system_prompt=config.data.system_prompt,
        max_reject_rate=config.data.max_reject_rate,
        resume=decision.kind == "resume",
        tensorboard=config.tracking.tensorboard,
        micro_batch_size=micro_batch_size(step, config),
        split=decision.split,
        command_started=command_started,
    )


def run_to_its_end(
    cluster: Cluster,
    call: StageCall,
    begin_step: Callable[[], None],
    max_failures: int,
    display: Display,
    again: str,
) -> Outcome:
    """Run a step; a worker that dies in it is started anew and goes on from the last checkpoint. One that ran out of
    memory, too, and computes its micro-batches in smaller parts from then on: the same numbers to rounding.

    Args:
        begin_step: clears the step's folder; called once there is a worker.

    Raises:
        WorkerDiedError: more than `max_failures` died.
        OutOfMemoryError: not even one row at a time fits.
        AlignError: the step's own.
    """
    failures, has_begun = 0, False
    while True:
        try:
            cluster.start()
            if not has_begun:
                begin_step()
                has_begun = True
            return cluster.run(call)
        except OutOfMemoryError as error:
            split = next_split(call.micro_batch_size, call.split)
            if split is None:
                raise OutOfMemoryError(f"{error}. {to_need_less(call.step, again)}") from None
            call = replace(call, split=split)
            rows = call.micro_batch_size
            said = f"{error}; a new worker computes {rows // split} of a micro-batch's {rows} rows at a time"
        except WorkerDiedError as error:
            failures += 1
            if failures > max_failures:
                next_time = f"Continue with: {again}" if has_begun or call.resume else "Nothing was changed: run again"
                raise WorkerDiedError(f"{error}. {next_time}") from None
            said = f"{error}; a new one ({failures} of cluster.max_failures {max_failures})"
        checkpoint = newest_whole(call.folder / "checkpoints")[0] if has_begun or call.resume else None
        where = "from the step's beginning" if checkpoint is None else f"after update {checkpoint.step}"
        display.note(f"warning: {said}, and goes on {where}")
        cluster.drop_worker()
        call = replace(call, resume=checkpoint is not None)


def finish(step: StepName, outcome: Outcome, prepared: Prepared, config: Config) -> FinishedStep:
    result, vitals = outcome.result, outcome.vitals
    if outcome.shape is not None:
        as_run = fitted(config, outcome.shape.context_length)
        plan = forecast(as_run, outcome.shape, on_gpu=vitals.peak_device_memory_bytes is not None)
        vitals = replace(vitals, forecast_bytes=plan.peak(step))
    accounts: dict[str, object] = {key: asdict(account) for key, account in prepared.data.accounts.items()}
    if result.account is not None:
        accounts["stage"] = asdict(result.account)
    return FinishedStep(prepared.fingerprint, result.artifacts, result.metrics, accounts, vitals)


def warn_of_stale(config: Config, first: StepName, *, run: Path, base_identity: str, display: Display) -> None:
    """A command for one stage takes the earlier ones as they stand: say where the config has moved on since."""
    for step in STEPS[: STEPS.index(first)]:
        finished = read_finished(run / step) if step in config.run.stages else None
        changed = finished and stale(step, finished, config, base_identity=base_identity)
        if changed:
            display.note(f"warning: {step} stands as it was run before, though since then {changed}")


class Watch:
    """Owns what the driver has seen of a busy worker: its messages and its last status."""

    def __init__(self, run: Path, display: Display) -> None:
        self._run = run
        self._display = display
        self._messages = MessageReader(run)
        self._seen = read_status(run)

    def start(self, step: StepName) -> None:
        """From here on, only what this step writes counts: what stands there is of an earlier one."""
        now = time.time()
        self._seen = Status(step, "starting", 0, 1, now, now, {})
        write_json(self._run / "status.json", asdict(self._seen), durable=False)

    def poll(self) -> None:
        for line in self._messages.read_new():
            self._display.note(line)
        status = read_status(self._run)
        if status is not None and status != self._seen:
            self._seen = status
            self._display.progress(status)


def _give_up(run: Path, display: Display, again: str, why: str) -> None:
    """On a process that is about to end in the middle of it all."""
    write_end(run, f"stopped, and {why}")
    display.note(f"warning: {why}; what was finished is kept. Continue: {again}")


@contextmanager
def _said_if_stopped(run: Path, again: str) -> Generator[None]:
    """Leave a word in the run folder for `align status`, and turn Ctrl-C into a message that says how to go on."""
    try:
        yield
    except AlignError as error:
        write_end(run, str(error))
        raise
    except KeyboardInterrupt:
        write_end(run, "stopped by the user")
        raise StoppedError(f"stopped; finished stages and checkpoints are kept. Continue: {again}") from None
    except SystemExit:  # Ray turns SIGTERM into it
        write_end(run, "terminated")
        raise TerminatedError(f"terminated; finished stages and checkpoints are kept. Continue: {again}") from None
    except Exception as error:
        write_end(run, f"{type(error).__name__}: {error}")
        raise
