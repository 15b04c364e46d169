"""A stage that is asked to stop first puts its last finished update on the disk, however rare its checkpoints are."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers

import align.slots
import stages.ppo.rollout
import stages.ppo.train
import stages.reward.train
import stages.sft.train
from align.artifacts import newest_whole
from align.context import StageContext, StageResult
from align.errors import InvariantError, StoppedError, UsageError
from align.sampler import Sampler
from align.stopping import ask_to_stop, forget_stop
from align.tracking import Tracker
from stages.ppo.train import run_ppo
from tests.resident import resident
from tests.stages.scenes import context_of, hashes_of, metrics_of, ppo_config, ppo_inputs, prompts
from tests.stages.test_continuation import SMALL, reward, sft

NEVER = {"every": None, "every_minutes": None}


def stopped(count: int, owner: Any, name: str, run: Callable[[], object], root: Path, patch: pytest.MonkeyPatch) -> int:
    """Run, and ask it to stop as it calls `owner.name` for the time of this number; the step of its newest checkpoint,
    0 without one."""
    seen, own = 0, getattr(owner, name)

    def calling(*args: Any, **kwargs: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen == count:
            ask_to_stop(root)
        return own(*args, **kwargs)

    with patch.context() as inside:
        inside.setattr(owner, name, calling)
        with pytest.raises(StoppedError):
            run()
    forget_stop(root)
    artifact, damage = newest_whole(next(root.glob("*/metrics.jsonl")).parent / "checkpoints")
    assert not damage
    return 0 if artifact is None else artifact.step


def ensemble(root: Path, **settings: Any) -> StageResult:
    return reward(root, ensemble=2, early_stopping={"every": 1, "patience": 3}, **settings)


# Each epoch has two steps of two micro-batches and one of one. Asked for in the micro-batch of this number, which ends;
# after the last one it is measured
@pytest.mark.parametrize(
    ("stage", "micro_batch", "finished"),
    [
        *((sft, 1, 0), (sft, 3, 1), (sft, 4, 2), (sft, 5, 3), (sft, 14, 8), (sft, 15, 9)),
        *((reward, 3, 1), (reward, 6, 3), (reward, 15, 9), (ensemble, 6, 3)),
    ],
)
def test_what_trl_trains_is_stopped_after_its_last_finished_step_and_ends_with_the_same_bytes(
    stage: Callable[..., StageResult],
    micro_batch: int,
    finished: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, root = tmp_path / "whole", tmp_path / "stopped"
    stage(whole, checkpoints=NEVER)
    step = stopped(
        micro_batch,
        transformers.Trainer,
        "training_step",
        lambda: stage(root, checkpoints=NEVER),
        root,
        monkeypatch,
    )
    assert step == finished
    folder = "sft" if stage is sft else "reward"
    stage(root, checkpoints=NEVER, resume=True)
    assert hashes_of(root / folder) == hashes_of(whole / folder)


def test_one_that_has_done_nothing_since_its_resume_keeps_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sft(tmp_path / "whole", checkpoints=NEVER)
    root = tmp_path / "stopped"
    for micro_batch, finished in ((5, 3), (1, 3), (3, 4)):
        again = micro_batch < 5
        step = stopped(
            micro_batch,
            transformers.Trainer,
            "training_step",
            lambda again=again: sft(root, checkpoints=NEVER, resume=again),
            root,
            monkeypatch,
        )
        assert step == finished
    sft(root, checkpoints=NEVER, resume=True)
    assert hashes_of(root / "sft") == hashes_of(tmp_path / "whole" / "sft")


# Of an update the 2 batches of 4 prompts with up to 6 tokens each, and the 4 micro-batches that are scored
@pytest.mark.parametrize(
    ("owner", "name", "count"),
    [(Sampler, "episodes", 3), (stages.ppo.rollout, "collate", 10), (align.slots.Slots, "enter", 6)],
)
def test_ppo_is_stopped_before_anything_of_the_next_update_has_moved(
    owner: Any, name: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ppo_config(updates=4, checkpoints=NEVER, kl={"controller": "adaptive"})

    def ppo(root: Path, *, resume: bool = False) -> None:
        run_ppo(config, ppo_inputs(root), context_of(resident(), root, "ppo", resume=resume))

    ppo(tmp_path / "whole")
    root = tmp_path / "stopped"
    own, scored = stages.ppo.train.score, 0

    def score(*args: Any, **kwargs: Any) -> Any:
        nonlocal scored
        scored += 1
        return own(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(stages.ppo.train, "score", score)
        assert stopped(count, owner, name, lambda: ppo(root), root, patch) == 2
    assert scored == (3 if name == "collate" else 2)  # what is asked for in the rollout is heeded there
    ppo(root, resume=True)
    assert hashes_of(root / "ppo") == hashes_of(tmp_path / "whole" / "ppo")


@pytest.mark.parametrize(("stage", "encode"), [(sft, "encode_demonstrations"), (reward, "encode_comparisons")])
def test_a_stage_is_stopped_while_it_tokenizes(
    stage: Callable[..., StageResult], encode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(StageContext, "load_sft")  # what would come next
    owner = stages.sft.train if stage is sft else stages.reward.train
    assert stopped(1, owner, encode, lambda: stage(tmp_path), tmp_path, monkeypatch) == 0


@pytest.mark.parametrize(("stage", "measuring"), [(sft, "held-out NLL"), (reward, "SFT answers")])
def test_a_stage_tells_how_far_it_is_where_it_does_not_train(
    stage: Callable[..., StageResult], measuring: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, list[tuple[int, int]]] = {}

    def progress(tracker: Tracker, done: int, total: int, doing: str) -> None:
        told.setdefault(doing, []).append((done, total))

    monkeypatch.setattr(Tracker, "progress", progress)
    stage(tmp_path)
    assert {done == total for done, total in told["tokenizing"]} == {False, True}  # from 0 to all
    assert told[measuring][0][0] == 0


def test_sft_that_dies_while_it_is_measured_is_not_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = sft(tmp_path / "whole")
    own, calls = stages.sft.train.held_out_nll, 0

    def held_out_nll(*args: Any, **kwargs: Any) -> float:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return own(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(stages.sft.train, "held_out_nll", held_out_nll)
        with pytest.raises(KeyboardInterrupt):
            sft(tmp_path / "stopped")
    monkeypatch.delattr(stages.sft.train, "train_adapter")
    resumed = sft(tmp_path / "stopped", resume=True)
    assert resumed.metrics == whole.metrics
    assert hashes_of(tmp_path / "stopped" / "sft") == hashes_of(tmp_path / "whole" / "sft")


def test_a_reward_model_that_is_trained_is_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = reward(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr("stages.reward.train.sample_answers", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            reward(tmp_path / "stopped")
    monkeypatch.delattr("stages.reward.trainer.Members._train")
    resumed = reward(tmp_path / "stopped", resume=True)
    assert resumed.metrics == whole.metrics
    assert hashes_of(tmp_path / "stopped" / "reward") == hashes_of(tmp_path / "whole" / "reward")


# ---- what was allowed to change has its effect ----


@pytest.mark.parametrize("stage", [sft, reward])
def test_a_learning_rate_that_was_changed_on_the_way_is_the_one_that_is_gone_on_with(
    stage: Callable[..., StageResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"checkpoints": NEVER, "schedule": "cosine"}
    name = "sft" if stage is sft else "reward"
    stage(tmp_path / "whole", **settings)
    root = tmp_path / "changed"
    stopped(6, transformers.Trainer, "training_step", lambda: stage(root, **settings), root, monkeypatch)
    stage(root, resume=True, learning_rate=SMALL["learning_rate"] / 4, **settings)
    rates, changed = (
        [line[f"{name}/learning_rate"] for line in metrics_of(folder / name) if f"{name}/learning_rate" in line]
        for folder in (tmp_path / "whole", root)
    )
    assert changed[:3] == rates[:3]
    assert changed[3:] == pytest.approx([rate / 4 for rate in rates[3:]])


@pytest.mark.parametrize("controller", ["fixed", "adaptive"])
def test_a_kl_coefficient_that_was_changed_on_the_way_is_the_one_that_is_gone_on_with(
    controller: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ppo(coefficient: float, *, resume: bool = False) -> None:
        kl = {"coefficient": coefficient, "controller": controller}
        config = ppo_config(updates=4, checkpoints=NEVER, kl=kl)
        run_ppo(config, ppo_inputs(tmp_path), context_of(resident(), tmp_path, "ppo", resume=resume))

    stopped(3, stages.ppo.train, "score", lambda: ppo(0.05), tmp_path, monkeypatch)
    ppo(0.5, resume=True)
    found = [line["objective/kl_coefficient"] for line in metrics_of(tmp_path / "ppo")]
    assert found[0] == 0.05
    assert found[2] == 0.5


def test_a_guard_that_was_allowed_on_the_way_begins_with_a_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = replace(ppo_inputs(tmp_path), held_out=prompts(4))

    def ppo(*, resume: bool = False, **sections: Any) -> StageResult:
        config = ppo_config(updates=4, checkpoints=NEVER, **sections)
        return run_ppo(config, inputs, context_of(resident(), tmp_path, "ppo", resume=resume))

    stopped(3, Sampler, "episodes", ppo, tmp_path, monkeypatch)
    result = ppo(resume=True, guard={"every": 50, "prompts": 4, "max_kl": 1e-9})
    assert result.metrics["kept_update"] == 2
    assert [line["step"] for line in metrics_of(tmp_path / "ppo") if "guard/score" in line] == [2]


@pytest.mark.parametrize("stage", [sft, reward])
def test_other_epochs_for_a_training_that_has_ended_are_refused(
    stage: Callable[..., StageResult], tmp_path: Path
) -> None:
    stage(tmp_path)
    name = "sft" if stage is sft else "reward"
    with pytest.raises(UsageError, match=rf"{name}\.epochs: a training of 3 epochs has ended; for 5 .*--fresh"):
        stage(tmp_path, resume=True, epochs=5)


def test_early_stopping_that_was_allowed_to_end_no_longer_puts_its_best_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: dict[str, Any] = {"early_stopping": {"every": 1, "patience": 99}, "checkpoints": NEVER}
    run = lambda: reward(tmp_path, **looks)  # noqa: E731
    stopped(6, transformers.Trainer, "training_step", run, tmp_path, monkeypatch)
    assert reward(tmp_path, resume=True, checkpoints=NEVER).metrics["kept_step"] == 9


def test_minibatches_that_would_leave_episodes_out_are_refused(tmp_path: Path) -> None:
    context = replace(context_of(resident(), tmp_path, "ppo"), split=3)
    with pytest.raises(InvariantError, match="some would be left out"):
        run_ppo(ppo_config(updates=1), ppo_inputs(tmp_path), context)
