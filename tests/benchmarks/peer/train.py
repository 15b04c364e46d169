"""One run of TRL 1.12.0's PPOTrainer for learning-parity, in a process of its own that sees that TRL.

The policy is a LoRA adapter on the base, the reference the same model with the adapter off. The value model is a second
copy of the base with a scalar head, trained whole: so does TRL ship it.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    set_seed,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer  # type: ignore[import-not-found]

from tests.benchmarks.parity_recipe import Job, Point, Recipe, read_job, write_result
from tests.benchmarks.parity_task import make_tokenizer, prompts, row_scorer
from tests.benchmarks.peer.scripted import ScriptedReward


def _arguments(recipe: Recipe, folder: Path, seed: int) -> Any:  # PPOConfig of a TRL that type checkers do not see
    """The recipe in TRL's words. One whole batch a device and no accumulation: with accumulation, TRL's optimizer steps
    once an epoch, whatever num_mini_batches says."""
    return PPOConfig(
        output_dir=str(folder / "trainer"), report_to="none", bf16=False, gradient_checkpointing=False, use_cpu=True,
        seed=seed, save_strategy="no", num_sample_generations=0, disable_tqdm=True,
        total_episodes=recipe.updates * recipe.episodes, per_device_train_batch_size=recipe.episodes,
        gradient_accumulation_steps=1, num_mini_batches=recipe.minibatches, num_ppo_epochs=recipe.epochs,
        local_rollout_forward_batch_size=recipe.episodes,
        learning_rate=recipe.learning_rate, lr_scheduler_type="linear", weight_decay=0.0,
        adam_beta1=recipe.betas[0], adam_beta2=recipe.betas[1], adam_epsilon=recipe.epsilon,
        kl_coef=recipe.kl, gamma=recipe.gamma, lam=recipe.lam, cliprange=recipe.clip,
        cliprange_value=recipe.value_clip, vf_coef=recipe.vf, temperature=recipe.temperature,
        response_length=recipe.response_length, stop_token="eos", missing_eos_penalty=None, whiten_rewards=False,
    )  # fmt: skip


def _rows(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Dataset:
    return Dataset.from_list(
        [
            {"input_ids": tokenizer(f"<user> {text} <assistant>", add_special_tokens=False)["input_ids"]}
            for text in texts
        ]
    )


def _trainer(job: Job, folder: Path) -> Any:
    tokenizer, recipe = make_tokenizer(), job.recipe
    tokenizer.padding_side = "left"
    trained_on, held_out = prompts()
    lora = LoraConfig(
        r=recipe.rank, lora_alpha=int(recipe.alpha), lora_dropout=0.0, target_modules=list(recipe.targets),
        task_type="CAUSAL_LM",
    )  # fmt: skip
    return PPOTrainer(
        args=_arguments(recipe, folder, job.seed),
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(job.model),
        ref_model=None,
        reward_model=ScriptedReward(row_scorer(tokenizer)),
        value_model=AutoModelForSequenceClassification.from_pretrained(job.model, num_labels=1),
        train_dataset=_rows(tokenizer, trained_on),
        eval_dataset=_rows(tokenizer, held_out),
        peft_config=lora,
    )


def main(path: Path) -> None:
    job, folder = read_job(path)
    torch.set_num_threads(1)
    set_seed(job.seed)
    trainer = _trainer(job, folder)
    trainer.train()
    trainer.model.policy.save_pretrained(folder / "policy")  # its own save_model fails beside this transformers
    logged = [line for line in trainer.state.log_history if "objective/scores" in line]
    curve = [Point(int(line["episode"]), line["objective/scores"], line["objective/kl"]) for line in logged]
    write_result(folder, job, folder / "policy", curve)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
