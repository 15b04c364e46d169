"""Training one reward model: TRL's RewardTrainer with our objectives, and the best state kept by held-out loss."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl.trainer.reward_config import RewardConfig as TRLConfig
from trl.trainer.reward_trainer import RewardTrainer

from align.adapters import AdaptedModel
from align.artifacts import scratch
from align.checkpoints import Checkpoint, Groups, StageCheckpoints, State
from align.config import EarlyStoppingConfig, RewardConfig
from align.context import StageContext
from align.errors import InvariantError
from align.heads import ScalarHead
from align.restore import lent
from data.tokenization import Codec
from stages.continuation import TrainerCheckpoints, tokens_before, verify_epochs
from stages.reward import objective
from stages.reward.batches import Collator, batch_scores
from stages.reward.evidence import Evidence, Labels
from stages.reward.scorer import Member, Scorer, score
from stages.trainer import ReportToTracker, trainer_arguments


@dataclass(frozen=True)
class Training:
    steps: int  # optimizer steps run
    kept_step: int  # the one whose state was kept: the last, or the best by held-out loss


class ScoreTrainer(RewardTrainer):
    """RewardTrainer with the losses of `evidence`. For pairs with sure labels they are TRL's own.

    Departure: a row counts the same in a step, in whatever micro-batch it stands; TRL averages micro-batches, of
    which an epoch's last may have fewer rows. So do the logged scores.
    """

    loss_is_scaled_for_ga = True  # by compute_loss, which divides by the rows of the whole step

    def __init__(self, *args: Any, evidence: Evidence, resident: AdaptedModel, head: ScalarHead, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._resident, self._head = resident, head
        self.model_accepts_loss_kwargs = True  # or Trainer does not count the rows of a step
        self._evidence = evidence
        self._num_tokens = 0
        self._step: list[tuple[Tensor, Labels]] = []  # scores_N and labels of the micro-batches since the last log

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        if return_outputs or num_items_in_batch is None:
            raise InvariantError("the trainer evaluates, or did not count the rows that its loss is divided by")
        labels = Labels(inputs["labels"], inputs["margin"])
        scores_N = batch_scores(self._resident, self._head, inputs)
        losses_B = self._evidence.losses(scores_N, labels)
        penalties_B = objective.centering_penalties(self._evidence.sides(scores_N))
        self._step.append((scores_N.detach(), labels))
        self._num_tokens += int(inputs["attention_mask"].sum())
        # Mean first, as TRL does: with whole micro-batches the bits are the same, and the share is 1 / their number
        return (losses_B.mean() + self._evidence.centering * penalties_B.mean()) / (num_items_in_batch / len(losses_B))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """What RewardTrainer logs, over all rows since the last time."""
        if self._step:
            scores_N, labels = self._take_step()
            logs["num_tokens"] = self._num_tokens
            logs["min_reward"] = scores_N.min().item()
            logs["mean_reward"] = scores_N.mean().item()
            logs["max_reward"] = scores_N.max().item()
            logs.update(self._evidence.seen(scores_N, labels))
        super().log(logs, start_time)

    def _take_step(self) -> tuple[Tensor, Labels]:
        sides = zip(*(self._evidence.sides(scores_N) for scores_N, _ in self._step), strict=True)
        scores_N = torch.cat([torch.cat(side) for side in sides])
        probability_B = torch.cat([labels.probability_B for _, labels in self._step])
        margin_B = torch.cat([labels.margin_B for _, labels in self._step])
        self._step.clear()
        return scores_N, Labels(probability_B, margin_B)


class KeepBest(TrainerCallback):
    """Owns the best state so far by held-out loss, and ends the training when `patience` looks have not bettered it.

    Goodfellow et al. 2016, algorithm 7.1. Departures: the state before the first step does not count, and the last
    step is looked at whenever it comes.
    """

    def __init__(
        self,
        look: Callable[[], float],
        *,
        scorer: nn.Module,
        tensors: Mapping[str, Tensor],
        settings: EarlyStoppingConfig,
        log: Callable[[int, float], None],
    ) -> None:
        self._look, self._scorer, self._tensors, self._settings, self._log = look, scorer, tensors, settings, log
        self._best_loss, self._best, self._looks_since = math.inf, dict[str, Tensor](), 0
        self.quality: float | None = None  # of the present step, if it was looked at: minus the held-out loss
        self.best_step = 0

    def state(self) -> tuple[Groups, State]:
        """For a checkpoint; nothing before the first look."""
        numbers = {"best_loss": self._best_loss, "best_step": self.best_step, "looks_since": self._looks_since}
        return ({"best": self._best}, {"best": numbers}) if self._best else ({}, {})

    def restore(self, checkpoint: Checkpoint) -> None:
        if "best" in checkpoint.state:
            numbers = checkpoint.state["best"]
            self._best_loss, self._looks_since = numbers["best_loss"], numbers["looks_since"]
            self._best, self.best_step = dict(checkpoint.groups["best"]), numbers["best_step"]

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        step, every = state.global_step, self._settings.every
        self.quality = None
        if every is None or (step % every and step < state.max_steps):
            return
        self._scorer.eval()  # without dropout
        loss = self._look()
        self._scorer.train()
        self._log(step, loss)
        self.quality = -loss
        self._looks_since += 1
        if loss < self._best_loss:
            self._best_loss, self.best_step, self._looks_since = loss, step, 0
            self._best = {name: tensor.detach().clone() for name, tensor in self._tensors.items()}
        control.should_training_stop |= self._looks_since >= self._settings.patience

    def put_back(self) -> None:
        """The best state into the tensors, whatever came after it; nothing if there was no look."""
        for name, best in self._best.items():
            self._tensors[name].data.copy_(best)


class Members:
    """Owns how far the members of a stage have come: they are trained one after another.

    A checkpoint's step counts the optimizer steps of all of them, and it holds what the finished ones have become.
    """

    def __init__(self, evidence: Evidence, config: RewardConfig, codec: Codec, context: StageContext) -> None:
        self._evidence, self._config, self._codec, self._context = evidence, config, codec, context
        self._checkpoints = StageCheckpoints(config.checkpoints, context)
        self._finished: list[tuple[Member, Training]] = []

    def train(self, members: Sequence[Member]) -> list[Training]:
        """Train those that a stopped run had not finished."""
        start = self._checkpoints.resume()
        done = [] if start is None else start.state["finished"]
        for number, member in enumerate(members):
            if start is not None and number < len(done):
                for name, tensor in self._tensors(member).items():
                    tensor.data.copy_(start.groups[member.name][name])
                verify_epochs("reward.epochs", start.state, self._config.epochs)
                training = Training(**done[number])
            else:
                training = self._train(member, start if number == len(done) else None)
            member.head.requires_grad_(False)
            self._finished.append((member, training))
            if len(done) <= number:  # also the last: what comes after is measured, which takes its time
                self._checkpoints.save(self._steps, *self._state())
        return [training for _, training in self._finished]

    @property
    def _steps(self) -> int:
        return sum(training.steps for _, training in self._finished)

    def _tensors(self, member: Member) -> dict[str, Tensor]:
        """Of its adapter and its head, by name."""
        head = {f"head/{name}": tensor for name, tensor in member.head.named_parameters()}
        return {**self._context.model.tensors(member.name), **head}

    def _state(self) -> tuple[Groups, State]:
        groups = {member.name: self._tensors(member) for member, _ in self._finished}
        finished = [asdict(training) for _, training in self._finished]
        return groups, {"finished": finished, "epochs": self._config.epochs}

    def _train(self, member: Member, start: Checkpoint | None) -> Training:
        """Let RewardTrainer train the member's adapter, which is there already, and its head."""
        evidence, config, codec, context = self._evidence, self._config, self._codec, self._context
        model, tracker = context.model, context.tracker
        rows = evidence.train_rows()

        def look() -> float:
            sizes = {"pad_id": codec.pad_id, "batch_size": context.part_of(config.micro_batch_size)}
            return evidence.held_out_loss(score(model, member, evidence.held_out_episodes(), **sizes))

        def also() -> tuple[Groups, State]:
            (finished, numbers), (best_tensors, best_numbers) = self._state(), best.state()
            return {**finished, **best_tensors}, {**numbers, **best_numbers}

        with lent(model.base.model), model.role(member.name, train=True), scratch(context.folder, "trainer") as folder:
            scorer = Scorer(model, member.head)
            best = KeepBest(
                look,
                scorer=scorer,
                tensors=self._tensors(member),
                settings=config.early_stopping,
                log=lambda step, loss: tracker.log(step, {f"{member.name}/held_out_loss": loss}),
            )
            if start is not None and config.early_stopping.every is not None:
                best.restore(start)
            report = ReportToTracker(tracker, member.name, tokens_before=tokens_before(start))
            kept = TrainerCheckpoints(
                self._checkpoints,
                report,
                start=start,
                also=also,
                quality=lambda: best.quality,
                steps_before=self._steps,
            )
            own = replace(context, seed=member.seed)
            trainer = ScoreTrainer(
                evidence=evidence,
                resident=model,
                head=member.head,
                model=scorer,
                args=TRLConfig(
                    **trainer_arguments(config, own, folder, num_rows=len(rows)),  # type: ignore[arg-type]
                    disable_dropout=False,  # adapters.dropout applies here too; TRL would set it to 0
                ),
                data_collator=Collator(codec.pad_id),
                train_dataset=Dataset.from_list(rows),  # type: ignore[arg-type]
                processing_class=model.base.tokenizer,
                callbacks=[report, best, kept],
            )
            model.verify_trainable()
            steps = kept.train(trainer, num_rows=len(rows))
            best.put_back()
        return Training(steps, best.best_step or steps)
