"""Supervised fine-tuning: TRL's SFTTrainer trains the `sft` adapter on the resident base."""

from collections.abc import Callable
from functools import partial

import torch
from datasets import Dataset
from trl.trainer.sft_config import SFTConfig as TRLConfig

from align.adapters import AdaptedModel
from align.artifacts import scratch
from align.checkpoints import Checkpoint, StageCheckpoints
from align.config import SFTConfig
from align.context import SFTInputs, StageContext, StageResult
from align.episodes import text_pass
from align.restore import lent
from data.batching import length_sorted_batches
from data.tokenization import TokenizedDemonstration, encode_demonstrations
from stages.continuation import TrainerCheckpoints, tokens_before, verify_epochs
from stages.sft.objective import negative_log_likelihood
from stages.sft.trainer import NLLTrainer
from stages.trainer import ReportToTracker, trainer_arguments

SFT = "sft"


def run_sft(config: SFTConfig, inputs: SFTInputs, context: StageContext) -> StageResult:
    """Train the `sft` adapter on the assistant's tokens of the demonstrations, the end of each turn included.

    Raises:
        DataError: too many rows do not fit the length, or none does.
        ArtifactError: the brought adapter does not fit the base.
    """
    model = context.model
    codec = model.base.codec(context.system_prompt)
    max_length = context.fitting_length("sft.max_length", config.max_length)
    encode = partial(encode_demonstrations, codec, max_length=max_length, on_progress=context.progress("tokenizing"))
    (train, train_rejects), (held_out, held_out_rejects) = encode(inputs.train), encode(inputs.held_out)
    set_aside = partial(context.set_aside, limit=f"sft.max_length {max_length}")
    account = set_aside("train", len(inputs.train), train_rejects, cuts=[row.num_cut for row in train])
    account += set_aside("held_out", len(inputs.held_out), held_out_rejects, cuts=[row.num_cut for row in held_out])

    context.load_sft(inputs.adapter)
    checkpoints = StageCheckpoints(config.checkpoints, context)
    start = checkpoints.resume()

    def measure() -> float:
        return held_out_nll(
            model,
            held_out,
            batch_size=context.part_of(config.micro_batch_size),
            pad_id=codec.pad_id,
            on_progress=context.progress("held-out NLL"),
        )

    nll_before = measure() if start is None else start.state["nll_before"]
    if start is not None and "steps" in start.state:  # it was trained, and stopped while it was measured
        verify_epochs("sft.epochs", start.state, config.epochs)
        for name, tensor in model.tensors(SFT).items():
            tensor.data.copy_(start.groups[SFT][name])
        steps = int(start.state["steps"])
    else:
        steps = train_adapter(train, config, context, checkpoints, start, nll_before)
        checkpoints.save(
            steps, {SFT: model.tensors(SFT)}, {"nll_before": nll_before, "steps": steps, "epochs": config.epochs}
        )
    nll_after = measure()

    artifact = context.write("adapter", "adapter", lambda path: model.save(SFT, path), step=steps)
    metrics = {"nll_before": nll_before, "nll_after": nll_after, "steps": steps, "held_out_rows": len(held_out)}
    return StageResult("sft", (artifact,), metrics, account)


def train_adapter(
    rows: list[TokenizedDemonstration],
    config: SFTConfig,
    context: StageContext,
    checkpoints: StageCheckpoints,
    start: Checkpoint | None,
    nll_before: float,
) -> int:
    """Let SFTTrainer train the `sft` adapter, from `start` if there is one; returns the optimizer steps in all."""
    model = context.model
    report = ReportToTracker(context.tracker, "sft", tokens_before=tokens_before(start))
    kept = TrainerCheckpoints(checkpoints, report, start=start, also=lambda: ({}, {"nll_before": nll_before}))
    with lent(model.peft), model.role(SFT, train=True), scratch(context.folder, "trainer") as folder:
        trainer = NLLTrainer(
            resident=model,
            args=TRLConfig(
                **trainer_arguments(config, context, folder, num_rows=len(rows)),  # type: ignore[arg-type]
                dataset_kwargs={"skip_prepare_dataset": True},  # the rows are token ids and labels already
            ),
            train_dataset=Dataset.from_list([_labelled(row) for row in rows]),
            processing_class=model.base.tokenizer,
            callbacks=[report, kept],
        )
        model.verify_trainable()
        return kept.train(trainer, num_rows=len(rows))


def _labelled(row: TokenizedDemonstration) -> dict[str, list[int] | int]:
    """TRL's tokenized row: −100 where nothing is learnt."""
    labels = [token if learnt else -100 for token, learnt in zip(row.ids, row.is_response, strict=True)]
    return {"input_ids": list(row.ids), "labels": labels, "length": len(row.ids)}


@torch.no_grad()
def held_out_nll(
    model: AdaptedModel,
    rows: list[TokenizedDemonstration],
    *,
    batch_size: int,
    pad_id: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> float:
    """Mean NLL in nats over all learnt tokens of the rows, with the `sft` adapter, dropout off."""
    logprobs = []
    groups = length_sorted_batches([len(row.ids) for row in rows], batch_size)
    with model.role(SFT):
        for done, group in enumerate(groups):
            on_progress(done, len(groups))
            logprobs.append(text_pass(model, [rows[i] for i in group], pad_id=pad_id))
    return negative_log_likelihood(torch.cat(logprobs)).item()
