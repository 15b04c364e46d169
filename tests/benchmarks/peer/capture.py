"""Runs TRL's own PPOTrainer for one update on a tiny model and writes down what it computed at each backward pass.

TRL computes rewards, advantages, returns and losses in the body of `PPOTrainer.train`. So `accelerator.backward` is
intercepted: it is called from there, and its caller's locals are those very numbers.
"""

import json
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification, set_seed
from trl.experimental.ppo import PPOConfig, PPOTrainer  # type: ignore[import-not-found]

from tests.benchmarks.peer.scripted import ScriptedReward, arbitrary_score

ROLLOUT = (
    "queries", "query_responses", "responses", "logprobs", "ref_logprobs", "values", "scores", "rewards",
    "advantages", "returns", "padding_mask", "padding_mask_p1", "sequence_lengths", "contain_eos_token",
)  # fmt: skip
STEP = ("micro_batch_inds", "new_logprobs", "vpred", "pg_loss", "vf_loss", "loss")


def _models(folder: str) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Policy, reference and value model in float64. The reference is the policy nudged, so that the KL is not 0."""
    policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    config = LlamaConfig.from_pretrained(folder)
    config.num_labels = 1
    value = LlamaForSequenceClassification(config).double()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        value.score.weight.normal_(std=0.5)
    return policy, reference, value


def main(path: Path) -> None:
    job: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    set_seed(job["seed"])  # numpy's too: TRL shuffles minibatches with it
    folder = Path(job["folder"])
    tokenizer = AutoTokenizer.from_pretrained(job["model"], padding_side="left")
    tokenizer.pad_token = job["pad_token"]
    policy, reference, value = _models(job["model"])
    if job["eos_bias"]:  # a random model would hardly ever end: make EOS likely, so that lengths differ
        _raise_eos(policy, reference, token=tokenizer.eos_token_id, times=job["eos_bias"])
    arguments = PPOConfig(
        output_dir=str(folder / "trainer"), report_to="none", bf16=False, gradient_checkpointing=False, use_cpu=True,
        seed=job["seed"], max_grad_norm=0.0, save_strategy="no", num_sample_generations=0, stop_token="eos",
        weight_decay=0.0, lr_scheduler_type="constant", disable_tqdm=True, **job["arguments"],
    )  # fmt: skip
    rows = Dataset.from_list([{"input_ids": ids} for ids in job["prompts"]])
    trainer = PPOTrainer(
        args=arguments, processing_class=tokenizer, model=policy, ref_model=reference,
        reward_model=ScriptedReward(arbitrary_score, torch.float64), value_model=value, train_dataset=rows,
        eval_dataset=rows,
    )  # fmt: skip
    captured: dict[str, Tensor] = {}
    backward = trainer.accelerator.backward

    def intercepted(loss: Tensor, **options: object) -> None:
        frame = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
        step = sum(key.endswith("/loss") for key in captured)
        wrapper = trainer.model
        weights = {f"{step}/weight/{name}": p.detach().clone() for name, p in wrapper.named_parameters()}
        backward(loss, **options)
        gradients = {
            f"{step}/gradient/{n}": p.grad.clone() for n, p in wrapper.named_parameters() if p.grad is not None
        }
        captured.update(_locals(frame, ROLLOUT, "rollout"))
        captured.update(_locals(frame, STEP, str(step)) | weights | gradients)

    trainer.accelerator.backward = intercepted
    trainer.train()
    save_file({name: tensor.contiguous() for name, tensor in captured.items()}, folder / "captured.safetensors")


def _locals(frame: FrameType, names: tuple[str, ...], prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": torch.as_tensor(frame.f_locals[name]).detach().clone() for name in names}


def _raise_eos(*models: nn.Module, token: int, times: float) -> None:
    """Give EOS the mean direction that hidden states have, by adding it to its row of the LM head."""
    with torch.no_grad():
        for model in models:
            head: Any = model.get_output_embeddings()  # type: ignore[operator]
            ids = torch.arange(64)[None]
            hidden: Any = model.model(input_ids=ids).last_hidden_state  # type: ignore[operator]
            head.weight[token] += times * hidden[0].mean(0) / hidden[0].mean(0).square().sum()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
