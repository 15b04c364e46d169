"""What SFT and reward training tell TRL's trainers, in one place: which settings, and where their logs go."""

import math
import time
from pathlib import Path

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from align.config import SupervisedConfig
from align.context import StageContext
from align.packing import packed_again
from align.tracking import Tracker

# What trainers log that is not reproducible (clocks), or says nothing: it stays out of metrics.jsonl.
_NOT_METRICS = {"epoch", "total_flos", "train_loss", "train_runtime"}
_WEIGHT_DECAY = 0.0  # an adapter that shrinks goes back to the base, not to a simpler function
_MAX_GRADIENT_NORM = 1.0


class ReportToTracker(TrainerCallback):
    """Sends a trainer's logs to metrics.jsonl and its steps to the progress bar."""

    def __init__(self, tracker: Tracker, prefix: str, *, tokens_before: float = 0.0) -> None:
        self._tracker = tracker
        self._prefix = prefix
        self._tokens_before = tokens_before  # trained on before a resume: trainers count from 0 again
        self.num_tokens = tokens_before
        self._since = time.perf_counter()  # its last line, or its beginning

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._since = time.perf_counter()
        self._tracker.progress(state.global_step, state.max_steps, "training")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._tracker.progress(state.global_step, state.max_steps, "training")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        values = {key: float(value) for key, value in (logs or {}).items() if key not in _NOT_METRICS}
        if "num_tokens" in values:
            values["num_tokens"] += self._tokens_before
            self.num_tokens = values["num_tokens"]
        values = {f"{self._prefix}/{key}": v for key, v in values.items() if "per_second" not in key}
        if len(values) > 1:  # the closing line of a training holds only clocks
            self._tracker.log(state.global_step, values)
            before, self._since = self._since, time.perf_counter()
            self._tracker.log_timing(state.global_step, {"seconds/learn": self._since - before})


def trainer_arguments(
    config: SupervisedConfig, context: StageContext, folder: Path, *, num_rows: int
) -> dict[str, object]:
    """Keyword arguments for SFTConfig and RewardConfig. Each default of TRL that we depart from is named here."""
    steps = math.ceil(config.epochs * math.ceil(num_rows / config.batch_size))
    schedule = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}[config.schedule]
    return {
        "output_dir": str(folder),
        "save_strategy": "no",  # ours are the only durable files
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "num_train_epochs": config.epochs,
        "per_device_train_batch_size": context.part_of(config.micro_batch_size),
        "gradient_accumulation_steps": config.batch_size // context.part_of(config.micro_batch_size),
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": schedule,
        # A share of all steps, rounded up, and the first of a warm-up has rate 0: in few steps there is none
        "warmup_steps": config.warmup_fraction if config.warmup_fraction * steps >= 1 else 0.0,
        "weight_decay": _WEIGHT_DECAY,
        "max_grad_norm": _MAX_GRADIENT_NORM,
        "train_sampling_strategy": "group_by_length",  # rows of like length together: a quarter less padding
        "length_column_name": "length",
        "remove_unused_columns": False,  # or the column of lengths would go before it is used
        "max_length": None,  # rows are cut by us: TRL drops or cuts without counting
        "bf16": False,  # no autocast: the base has its dtype, adapters and heads are float32
        "gradient_checkpointing": config.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False, "context_fn": packed_again},
        "seed": context.seed,
        "data_seed": context.seed,
        "use_cpu": context.model.device.type == "cpu",
        "dataloader_pin_memory": False,
    }
