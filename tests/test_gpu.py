"""What only a GPU can show: `make test-gpu`. Nothing here has been run by the project itself, which has none."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from align.adapters import AdaptedModel
from align.base import load_base
from align.config import AdaptersConfig, BaseModelConfig
from align.episodes import collate, policy_pass
from tests.resident import drawn_episodes, randomize

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_whole_pipeline_runs_on_one_gpu(dtype: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "align.cli", "run", "configs/tiny.yaml", f"run.root={tmp_path}", "--json"]
    command += ["base.device=cuda", f"base.dtype={dtype}", "cluster.gpus=1"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    summary = json.loads(done.stdout)
    assert summary["base"]["loads"] == 1
    assert summary["base"]["unchanged"] is True
    assert summary["ppo"]["first_minibatch_ratio_error"] <= (1e-5 if dtype == "float32" else 1e-3)
    assert summary["peak_device_memory_bytes"] > 0


def test_logprobs_on_the_gpu_are_those_of_the_cpu() -> None:
    passes = {}
    for device in ("cpu", "cuda"):
        base = load_base(BaseModelConfig.model_validate({"model": "tiny:llama", "device": device}))
        model = AdaptedModel(base, AdaptersConfig(rank=4))
        model.add("sft")
        randomize(model, "sft")
        batch = collate(drawn_episodes([(5, 3), (9, 6)], end=1), pad_id=0, device=model.device)
        with torch.no_grad(), model.role("sft"):
            passes[device] = policy_pass(model, batch).logprobs_BT.cpu()
    torch.testing.assert_close(passes["cpu"], passes["cuda"], atol=1e-3, rtol=1e-3)
