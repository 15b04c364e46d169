from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    LlamaForSequenceClassification,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl.trainer.reward_config import RewardConfig as TRLConfig
from trl.trainer.reward_trainer import RewardTrainer

from align.config import EarlyStoppingConfig, RewardConfig, RewardObjectiveConfig
from align.context import RewardInputs
from align.heads import ScalarHead
from data.records import Comparison
from data.tokenization import encode_comparisons, encode_verdicts
from stages.reward.batches import Collator
from stages.reward.evidence import Evidence
from stages.reward.pairs import Pairs
from stages.reward.scorer import Scorer
from stages.reward.train import run_reward
from stages.reward.trainer import KeepBest, ScoreTrainer
from stages.reward.verdicts import Verdicts
from stages.trainer import trainer_arguments
from tests.resident import SHAPES, with_adapters
from tests.stages.reward.classifiers import classifier_on_trunk
from tests.stages.scenes import SAMPLING, comparisons, context_of, hashes_of, metrics_of, verdicts

RAO_KUPPER, UNPAIRED = RewardObjectiveConfig(kind="rao-kupper"), RewardObjectiveConfig(kind="unpaired", centering=0.2)


class Steps(TrainerCallback):
    """Keeps each optimizer step's gradients, clipped as they are taken, and each logged line."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.gradients: list[dict[str, Tensor]] = []
        self.logs: list[dict[str, float]] = []

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        found = {name: p.grad.clone() for name, p in self._model.named_parameters() if p.grad is not None}
        self.gradients.append(found)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        self.logs.append(dict(logs or {}))


def of_lengths(count: int) -> tuple[Comparison, ...]:
    return tuple(replace(pair, chosen=pair.chosen + "!" * n) for n, pair in enumerate(comparisons(count)))


def evidence_of(settings: RewardObjectiveConfig, *, count: int = 7, shape: str = "llama") -> Evidence:
    codec = with_adapters(shape, "reward").base.codec(None)
    if settings.kind == "unpaired":
        rows, _ = encode_verdicts(codec, verdicts(count), max_length=200)
        return Verdicts.of(rows, rows, settings)
    pairs, _ = encode_comparisons(codec, of_lengths(count), max_length=200)
    if settings.kind == "rao-kupper":
        pairs = [replace(row, preference=(1.0, 0.5, 0.3)[n % 3]) for n, row in enumerate(pairs)]
    return Pairs.of(pairs, pairs, settings)


def steps_of(
    kind: type[RewardTrainer],
    evidence: Evidence,
    folder: Path,
    *,
    shape: str = "llama",
    is_packed: bool = False,
    **settings: Any,
) -> Steps:
    """Train a fresh model with random adapters, on the rows of `evidence`."""
    given = {"max_length": 200, "learning_rate": 1e-2, "warmup_fraction": 0.0, **settings}
    config = RewardConfig.model_validate({"schedule": "constant", **given})
    model = with_adapters(shape, "sft", "reward")
    for module in model.base.model.modules():  # GPT-2's own dropout draws for every token
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model._has_dropout = False  # pyright: ignore[reportPrivateUsage]
    codec, head = model.base.codec(None), ScalarHead(model.hidden_size).initialize(3)
    context = context_of(model, folder, "reward")
    collator = Collator(codec.pad_id)
    if not is_packed:
        model.packings.longest = 0
    own: dict[str, Any] = {"evidence": evidence, "resident": model, "head": head, "data_collator": collator}
    with model.role("reward", train=True):
        is_ours = kind is ScoreTrainer
        scorer = Scorer(model, head) if is_ours else classifier_on_trunk(model, head, pad_id=codec.pad_id)
        steps = Steps(scorer)
        kind(
            **(own if is_ours else {}),
            model=scorer,
            args=TRLConfig(
                **trainer_arguments(config, context, folder, num_rows=len(evidence.train_rows())),  # type: ignore[arg-type]
                center_rewards_coefficient=evidence.centering,  # TRL's own loss reads it, ours does not
                disable_dropout=False,
            ),
            train_dataset=Dataset.from_list(evidence.train_rows()),  # type: ignore[arg-type]
            processing_class=model.base.tokenizer,
            callbacks=[steps],
        ).train()
    return steps


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_margin", [False, True])
def test_for_sure_pairs_the_losses_and_gradients_are_trls_to_the_bit(
    shape: str, with_margin: bool, tmp_path: Path
) -> None:
    pairs = evidence_of(RewardObjectiveConfig(centering=0.3), count=12, shape=shape)
    assert isinstance(pairs, Pairs)
    if with_margin:
        train = tuple(replace(row, margin=0.5 * n) for n, row in enumerate(pairs.train))
        pairs = replace(pairs, train=train)
    settings: dict[str, Any] = {"batch_size": 6, "micro_batch_size": 3, "shape": shape}
    mine = steps_of(ScoreTrainer, pairs, tmp_path / "ours", **settings)
    theirs = steps_of(RewardTrainer, pairs, tmp_path / "trl", **settings)
    assert len(mine.gradients) == len(theirs.gradients) == 2
    for own, other in zip(mine.gradients, theirs.gradients, strict=True):
        assert own.keys() == other.keys()
        assert any(gradient.abs().max() > 0 for name, gradient in own.items() if "lora_" in name)
        for name, gradient in own.items():
            assert torch.equal(gradient, other[name]), name
    # Of what is logged, only the extremes differ: TRL's are means over micro-batches
    for own, other in zip(mine.logs[:-1], theirs.logs[:-1], strict=True):
        assert own.keys() == other.keys()
        for key in own.keys() - {"min_reward", "max_reward"}:
            assert own[key] == pytest.approx(other[key], abs=1e-6), key


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_the_losses_and_gradients_are_the_same(shape: str, checkpointing: bool, tmp_path: Path) -> None:
    pairs = evidence_of(RewardObjectiveConfig(centering=0.3), count=12, shape=shape)
    # AdamW's first steps go by signs, of gradients near 0 too: with a rate to speak of, roundings would not stay small
    settings: dict[str, Any] = {"batch_size": 6, "micro_batch_size": 3, "shape": shape, "learning_rate": 1e-9}
    separate = steps_of(ScoreTrainer, pairs, tmp_path / "separate", **settings)
    settings["gradient_checkpointing"] = checkpointing
    packed = steps_of(ScoreTrainer, pairs, tmp_path / "packed", is_packed=True, **settings)
    for own, other in zip(packed.gradients, separate.gradients, strict=True):
        for name, gradient in own.items():
            torch.testing.assert_close(gradient, other[name], atol=1e-6, rtol=1e-4)
    for own, other in zip(packed.logs[:-1], separate.logs[:-1], strict=True):
        assert own == {key: pytest.approx(value, rel=1e-4, abs=1e-5) for key, value in other.items()}


@pytest.mark.parametrize("settings", [RewardObjectiveConfig(centering=0.2), RAO_KUPPER, UNPAIRED])
def test_a_row_counts_the_same_whatever_the_micro_batch(settings: RewardObjectiveConfig, tmp_path: Path) -> None:
    # 7 rows a step: in micro-batches of 8 it is one, of 4 they are 4 and 3, of 2 the last is 1
    evidence = evidence_of(settings)
    whole, *parts = (
        steps_of(ScoreTrainer, evidence, tmp_path / str(size), batch_size=8, micro_batch_size=size)
        for size in (8, 4, 2, 1)
    )
    assert len(whole.gradients) == 1
    for part in parts:
        for name, gradient in whole.gradients[0].items():
            torch.testing.assert_close(part.gradients[0][name], gradient, atol=2e-6, rtol=1e-4)
        for key, value in whole.logs[0].items():
            assert part.logs[0][key] == pytest.approx(value, abs=1e-5), key


def test_rows_are_counted_for_an_architecture_that_takes_no_loss_arguments_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaForSequenceClassification, "accepts_loss_kwargs", False, raising=False)
    evidence = evidence_of(RewardObjectiveConfig())
    assert len(steps_of(ScoreTrainer, evidence, tmp_path, batch_size=8, micro_batch_size=4).gradients) == 1


def test_the_first_step_pushes_by_the_objective_that_was_asked_for(tmp_path: Path) -> None:
    # The same rows with θ far apart, or as one of the two weights, have other gradients
    seen = [
        steps_of(ScoreTrainer, evidence, tmp_path / str(n), batch_size=8, micro_batch_size=8).logs[0]["loss"]
        for n, evidence in enumerate(
            evidence_of(settings)
            for settings in (
                RAO_KUPPER,
                RewardObjectiveConfig(kind="rao-kupper", tie_threshold=9.0),
                UNPAIRED,
                RewardObjectiveConfig(kind="unpaired", positive_weight=7.0, centering=0.2),
                RewardObjectiveConfig(kind="unpaired", positive_weight=7.0, centering=0.0),
            )
        )
    ]
    assert len({round(loss, 4) for loss in seen}) == len(seen)


# ---- the best state ----


class Scripted:
    """Looks that give these losses; the tensor counts the steps, so that it tells which state it is."""

    def __init__(self, losses: list[float], *, every: int, patience: int, max_steps: int) -> None:
        self.state_of = torch.zeros(1)
        self.logged: list[tuple[int, float]] = []
        self.modes: list[bool] = []
        self.scorer = nn.Dropout()
        self.max_steps = max_steps
        self._losses = iter(losses)
        self.best = KeepBest(
            self._look,
            scorer=self.scorer,
            tensors={"x": self.state_of},
            settings=EarlyStoppingConfig(every=every, patience=patience),
            log=lambda step, loss: self.logged.append((step, loss)),
        )

    def _look(self) -> float:
        self.modes.append(self.scorer.training)
        return next(self._losses)

    def train(self) -> int:
        """The steps until it is stopped, or all."""
        state, control = TrainerState(max_steps=self.max_steps), TrainerControl()
        while state.global_step < self.max_steps and not control.should_training_stop:
            state.global_step += 1
            self.state_of += 1
            self.best.on_step_end(TrainingArguments(), state, control)
            assert self.scorer.training
        return state.global_step


def test_training_stops_after_so_many_looks_without_a_new_best_and_the_best_state_is_kept() -> None:
    # looks at 2, 4, 6, 8: 3, 2, 2 (no better), 2.5 → the second miss in a row stops it
    run = Scripted([3.0, 2.0, 2.0, 2.5, 0.0], every=2, patience=2, max_steps=20)
    assert run.train() == 8
    assert run.logged == [(2, 3.0), (4, 2.0), (6, 2.0), (8, 2.5)]
    assert run.best.best_step == 4
    run.best.put_back()
    assert run.state_of.item() == 4


def test_a_new_best_gives_patience_anew() -> None:
    run = Scripted([3.0, 4.0, 2.0, 4.0, 1.0, 4.0], every=1, patience=2, max_steps=6)
    assert run.train() == 6
    assert run.best.best_step == 5


def test_the_last_step_is_looked_at_and_nothing_is_between_the_looks() -> None:
    run = Scripted([3.0, 2.0, 1.0], every=3, patience=5, max_steps=8)
    run.train()
    assert [step for step, _ in run.logged] == [3, 6, 8]
    run.best.put_back()
    assert run.state_of.item() == 8


def test_a_look_is_without_dropout() -> None:
    run = Scripted([3.0, 2.0], every=1, patience=5, max_steps=2)
    run.train()
    assert run.modes == [False, False]


def inputs(*, held_out: tuple[Comparison, ...] | None = None) -> RewardInputs:
    return RewardInputs(None, comparisons(8), held_out or comparisons(6, start=50), SAMPLING)


def run(folder: Path, given: RewardInputs, **settings: Any) -> dict[str, Any]:
    model = with_adapters("llama", dropout=0.1)
    small = {"batch_size": 4, "micro_batch_size": 2, "max_length": 200, "learning_rate": 5e-3, **settings}
    config = RewardConfig.model_validate(small)
    return dict(run_reward(config, given, context_of(model, folder, "reward")).metrics)


def test_looking_changes_nothing_but_what_is_kept(tmp_path: Path) -> None:
    # Held-out pairs like those that are learnt: every look is the best so far, so the last state is kept
    without = run(tmp_path / "without", inputs(), epochs=3)
    looking = run(tmp_path / "looking", inputs(), epochs=3, early_stopping={"every": 1, "patience": 1})
    assert looking == without
    assert (looking["steps"], looking["kept_step"]) == (6, 6)
    one, other = (hashes_of(tmp_path / name / "reward") for name in ("without", "looking"))
    assert one.pop("metrics.jsonl") != other.pop("metrics.jsonl")  # the held-out losses are logged
    assert one == other


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_state_with_the_least_held_out_loss_is_what_is_saved(checkpointing: bool, tmp_path: Path) -> None:
    # Held-out pairs are the other way round: the more is learnt, the worse they get, once the rate is above 0
    turned = inputs(held_out=comparisons(6, chosen="bad", rejected="good", start=50))
    stopping = {"every": 1, "patience": 2}
    metrics = run(tmp_path, turned, epochs=5, early_stopping=stopping, gradient_checkpointing=checkpointing)
    losses = {
        line["step"]: line["reward/held_out_loss"]
        for line in metrics_of(tmp_path / "reward")
        if "reward/held_out_loss" in line
    }
    assert len(losses) == metrics["steps"] < 10
    assert metrics["steps"] == metrics["kept_step"] + 2
    assert min(losses, key=lambda step: losses[step]) == metrics["kept_step"]
    assert metrics["loss"] == pytest.approx(min(losses.values()), abs=1e-6)
