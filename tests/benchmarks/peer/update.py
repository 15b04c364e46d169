"""TRL 1.12.0's PPOTrainer for ppo-update, in a process of its own that sees that TRL.

As shipped (trl): the policy is a LoRA adapter on the base, the reference the same model with the adapter off, the
reward model a second model, the value model a third, trained whole. With a LoRA critic (trl-lora): the value model is
adapted by PEFT like the policy, and its score head is trained beside the adapter.

A device's batch of 4, accumulated 4 times, is the rollout of 16, learnt from in micro-batches of 4. (TRL's optimizer
then steps once an epoch, not once a minibatch: half of our steps, and the work is otherwise the same.) It generates and
scores all 16 at once, as by default. No stop token: every response has its full length, and its sampling costs nothing
more. In bfloat16 all three models are loaded as such, which is faster than float32 models under autocast; PEFT keeps
the policy's adapter, and the critic's, in float32, as it does by default.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
    set_seed,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer  # type: ignore[import-not-found]

from tests.benchmarks.ppo_update_task import BASE, END, PROMPTS, Job, Task, Update, read_job, write_report
from tests.benchmarks.process_tree import resident_bytes

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Clock(TrainerCallback):
    """When each update's phases ended. It learns of them from outside: TRL's code is as it was.

    Generation ends where `batch_generation` returns, scoring where the policy and value model together make their
    first forward pass, the update where TRL calls `on_step_end`.
    """

    def __init__(self) -> None:
        self.updates: list[Update] = []
        self.optimizer_steps: list[int] = []
        self._begin()

    def _begin(self) -> None:
        self._began = time.perf_counter()
        self._generated = self._scored = 0.0
        self._steps = 0

    def watch(self, trainer: Any, task: Task, pad_id: int) -> None:
        ppo_trainer.batch_generation = self._watched(ppo_trainer.batch_generation, task, pad_id)
        trainer.model.register_forward_pre_hook(self._before_learning)
        trainer.optimizer.optimizer.register_step_post_hook(self._after_step)

    def _watched(
        self, generate: Callable[..., tuple[Tensor, Tensor]], task: Task, pad_id: int
    ) -> Callable[..., tuple[Tensor, Tensor]]:
        def watched(*arguments: object) -> tuple[Tensor, Tensor]:
            ids_BS, logits_BTV = generate(*arguments)
            self._generated = time.perf_counter()
            if ids_BS.shape != (task.episodes, task.prompt_length + task.response_length) or (ids_BS == pad_id).any():
                raise RuntimeError(f"episodes have not the lengths that were asked for: {tuple(ids_BS.shape)}")
            return ids_BS, logits_BTV

        return watched

    def _before_learning(self, *_: object) -> None:
        self._scored = self._scored or time.perf_counter()

    def _after_step(self, *_: object) -> None:
        self._steps += 1

    def on_train_begin(self, *_: object, **__: object) -> None:
        self._begin()

    def on_step_end(self, *_: object, **__: object) -> None:
        now, generated, scored = time.perf_counter(), self._generated, self._scored
        update = Update(generated - self._began, scored - generated, now - scored, now - self._began)
        self.updates.append(update)
        self.optimizer_steps.append(self._steps)
        self._begin()


def _arguments(task: Task, folder: Path) -> Any:  # PPOConfig of a TRL that type checkers do not see
    return PPOConfig(
        output_dir=str(folder / "trainer"), report_to="none", bf16=False, gradient_checkpointing=False, use_cpu=True,
        seed=0, save_strategy="no", num_sample_generations=0, disable_tqdm=True,
        total_episodes=task.updates * task.episodes, per_device_train_batch_size=task.micro_batch,
        gradient_accumulation_steps=task.episodes // task.micro_batch, num_mini_batches=task.minibatches,
        num_ppo_epochs=task.epochs, learning_rate=task.learning_rate, weight_decay=0.0, lam=task.lam,
        temperature=task.temperature, response_length=task.response_length, stop_token=None,
    )  # fmt: skip


def _lora(task: Task, kind: str) -> LoraConfig:
    return LoraConfig(r=task.rank, lora_alpha=int(task.alpha), lora_dropout=0.0, target_modules=TARGETS, task_type=kind)


def _trainer(job: Job, folder: Path, tokenizer: PreTrainedTokenizerFast, clock: Clock) -> Any:
    base, dtype, task = Path(job.prepared) / BASE, getattr(torch, job.dtype), job.task
    value, reward = (
        LlamaForSequenceClassification.from_pretrained(base, num_labels=1, dtype=dtype) for _ in ("value", "reward")
    )
    if job.system == "trl-lora":  # TRL looks for the trunk by a name that PEFT's wrapper gives to the whole model
        value = get_peft_model(value, _lora(task, "SEQ_CLS")).get_base_model()
    texts = json.loads((Path(job.prepared) / PROMPTS).read_text(encoding="utf-8"))
    rows = Dataset.from_list([{"input_ids": tokenizer(text)["input_ids"]} for text in texts])
    return PPOTrainer(
        args=_arguments(task, folder),
        processing_class=tokenizer,
        model=LlamaForCausalLM.from_pretrained(base, dtype=dtype),
        ref_model=None,
        reward_model=reward,
        value_model=value,
        train_dataset=rows,
        eval_dataset=rows,
        peft_config=_lora(task, "CAUSAL_LM"),
        callbacks=[clock],
    )


def main(path: Path) -> None:
    imports_bytes, _ = resident_bytes(os.getpid())
    job, folder = read_job(path)
    set_seed(0)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(Path(job.prepared) / BASE, padding_side="left", pad_token=END)
    clock = Clock()
    trainer = _trainer(job, folder, tokenizer, clock)
    clock.watch(trainer, job.task, tokenizer.pad_token_id)
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    print(f"trained parameters: {trained:,}", flush=True)
    trainer.train()
    write_report(
        folder,
        job,
        clock.updates[1:],
        optimizer_steps=clock.optimizer_steps[-1],
        imports_bytes=imports_bytes,
        threads=torch.get_num_threads(),
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
