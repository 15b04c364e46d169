"""Stages that only write what a stage writes, with tricks for the tests of the driver. They run in a Ray worker."""

import json
import os
import shutil
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from align.artifacts import Artifact, write_directory
from align.context import StageContext, StageResult
from align.errors import InvariantError, RewardFunctionError, StorageError
from align.stopping import is_asked_to_stop


def fake_sft(config: Any, inputs: Any, context: StageContext) -> StageResult:
    assert inputs.train
    assert inputs.held_out
    context.tracker.progress(0, 1, "pretending")
    context.tracker.log(1, {"loss": 0.5})
    artifact = _write(context, "adapter", str(config.learning_rate))
    told = {"seed": context.seed, "system_prompt": context.system_prompt, "max_reject_rate": context.max_reject_rate}
    return StageResult("sft", (artifact,), {"nll_before": 2.0, "nll_after": 1.0, **told})


def fake_reward(config: Any, inputs: Any, context: StageContext) -> StageResult:
    assert inputs.sft is not None
    artifacts = (_write(context, "adapter", inputs.sft.content_hash), _write(context, "head", "h"))
    return StageResult("reward", artifacts, {"accuracy": 0.9, "seed": context.seed})


def fake_ppo(config: Any, inputs: Any, context: StageContext) -> StageResult:
    started_at = 2 if context.resume else 0
    if context.resume:
        context.tracker.rewind({"timings.jsonl": 1})
    return StageResult("ppo", (_write(context, "adapter", f"p{config.updates}"),), {"first_update": started_at})


def fake_evaluation(config: Any, inputs: Any, context: StageContext) -> StageResult:
    return StageResult("evaluation", (), {"prompts": len(inputs.prompts), "policy": inputs.policy.stage})


def failing_invariant(config: Any, inputs: Any, context: StageContext) -> StageResult:
    raise InvariantError("the ratio is 3")


def with_a_failing_reward_function(config: Any, inputs: Any, context: StageContext) -> StageResult:
    raise RewardFunctionError("mine:score raised KeyError") from KeyError("colour")


def failing_somehow(config: Any, inputs: Any, context: StageContext) -> StageResult:
    raise LookupError("no such luck")


def telling_what_gpus_it_sees(config: Any, inputs: Any, context: StageContext) -> StageResult:
    result = fake_sft(config, inputs, context)
    return replace(result, metrics={**result.metrics, "sees": os.environ.get("CUDA_VISIBLE_DEVICES")})


def dying(config: Any, inputs: Any, context: StageContext) -> StageResult:
    os._exit(7)


def dying_once(config: Any, inputs: Any, context: StageContext) -> StageResult:
    """With a checkpoint behind it and a word on stderr."""
    if not context.resume:
        stopping = _leave_checkpoint(context, seconds=1000.0)
        print(f"\x1b[31mno more room for {stopping.kind}\x1b[0m", file=sys.stderr, flush=True)
        os._exit(7)
    return fake_ppo(config, inputs, context)


def without_memory_for(rows: int, config: Any, inputs: Any, context: StageContext) -> StageResult:
    """PPO whose micro-batch, of two rows, does not fit if `rows` or more of it are computed at once."""
    if 2 // context.split >= rows:
        _leave_checkpoint(context)
        torch.empty(2**60)
    result = fake_ppo(config, inputs, context)
    return replace(result, metrics={**result.metrics, "split": context.split})


def hungry(config: Any, inputs: Any, context: StageContext) -> StageResult:
    """Takes more and more of the machine's memory until it is computed in parts."""
    held: list[bytes] = []
    while context.split == 1:
        held.append(b"x" * 2**27)
        time.sleep(0.1)  # Ray looks four times a second
    return fake_sft(config, inputs, context)


def stopping_in_parts(config: Any, inputs: Any, context: StageContext) -> StageResult:
    """Runs out of memory until it is computed in two parts, and then is stopped."""
    if context.split == 1:
        torch.empty(2**60)
    _leave_checkpoint(context)
    raise KeyboardInterrupt


def touching_the_base(config: Any, inputs: Any, context: StageContext) -> StageResult:
    weight = next(context.model.base.model.parameters())
    weight.data.view(-1)[0] += 1e-3
    return fake_sft(config, inputs, context)


def stopping_half_way(config: Any, inputs: Any, context: StageContext) -> StageResult:
    _leave_checkpoint(context, seconds=1000.0)
    context.tracker.log_timing(3, {"seconds/learn": 50.0})
    raise KeyboardInterrupt


def ending_once_asked_to_stop(config: Any, inputs: Any, context: StageContext) -> StageResult:
    """A reward stage that was about done."""
    (context.folder / "waiting").touch()
    while not is_asked_to_stop(context.folder.parent):
        time.sleep(0.05)
    return fake_reward(config, inputs, context)


def failing_once_asked_to_stop(config: Any, inputs: Any, context: StageContext) -> StageResult:
    ending_once_asked_to_stop(config, inputs, context)
    raise StorageError("no room")


def deaf(config: Any, inputs: Any, context: StageContext) -> StageResult:
    """One that is in the midst of writing, and does not end."""
    (context.folder / "waiting").touch()
    while True:
        (context.folder / ".adapter.1.tmp").mkdir(exist_ok=True)
        time.sleep(0.001)


def filling_the_disk(ballast: Path, config: Any, inputs: Any, context: StageContext) -> StageResult:
    """A reward stage that leaves no room for its result, though its artifacts are there."""
    result = fake_reward(config, inputs, context)
    with suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return result


def losing_the_run_folder(config: Any, inputs: Any, context: StageContext) -> StageResult:
    shutil.rmtree(context.folder.parent)
    context.tracker.log(1, {"loss": 1.0})
    raise AssertionError("not reached")


def _leave_checkpoint(context: StageContext, *, seconds: float = 0.0) -> Artifact:
    """After two updates and one line of clocks."""
    context.tracker.log_timing(2, {"seconds/learn": seconds})
    return _write(context, "checkpoint", "c", name="checkpoints/update-00002")


def _write(context: StageContext, kind: str, text: str, *, name: str | None = None) -> Artifact:
    path = context.folder / (name or kind)
    path.parent.mkdir(parents=True, exist_ok=True)

    def fill(folder: Path) -> None:
        (folder / "content").write_text(text)
        (folder / "state.json").write_text(json.dumps({"split": context.split}))

    return write_directory(
        path, fill, kind=kind, stage=context.folder.name, step=2, base_identity=context.model.base_identity
    )


STAGES = {"sft": fake_sft, "reward": fake_reward, "ppo": fake_ppo, "evaluation": fake_evaluation}
