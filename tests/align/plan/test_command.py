"""`align plan` as it is called."""

import json
from pathlib import Path

import pytest

from tests.align.recipe import write_recipe
from tests.align.test_cli import align


@pytest.fixture
def llama_8b(tmp_path: Path) -> Path:
    """A folder that holds a config.json and nothing else."""
    folder = tmp_path / "llama-8b"
    folder.mkdir()
    content = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "vocab_size": 128_256,
        "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def test_an_8b_base_carries_all_roles_for_a_tenth_more_and_fits_a_large_gpu(tmp_path: Path, llama_8b: Path) -> None:
    recipe = write_recipe(tmp_path)
    overrides = [f"base.model={llama_8b}", "base.dtype=bfloat16", "adapters.rank=16"]
    overrides += ["sft.max_length=256", "reward.max_length=256"]
    finished = align("plan", recipe, *overrides, "--gpu-memory", "80GB", "--json")
    assert finished.returncode == 0, finished.stderr
    plan = json.loads(finished.stdout)
    assert (plan["device"], plan["fits"]) == ("GPU", True)
    assert plan["roles"][0]["weights"] == 2 * 8_030_261_248
    assert 1.0 < plan["resident_over_base"] <= 1.1
    assert {(phase["stage"], phase["name"]) for phase in plan["phases"]} >= {("sft", "train"), ("ppo", "learn")}


def test_what_does_not_fit_comes_with_what_to_change_and_exit_code_1(tmp_path: Path, llama_8b: Path) -> None:
    recipe = write_recipe(tmp_path)
    arguments = [f"base.model={llama_8b}", "ppo.loss.micro_batch_size=8", "ppo.rollout.episodes=64"]
    finished = align("plan", recipe, *arguments, "--gpu-memory", "40GB")
    assert finished.returncode == 1, finished.stderr
    assert "does not fit" in finished.stdout
    assert "base.dtype=bfloat16" in finished.stdout
    assert finished.stderr.replace("LOADED torch\n", "").count("error") == 0


def test_several_gpus_are_said_to_be_to_come(tmp_path: Path) -> None:
    finished = align("plan", write_recipe(tmp_path), "--gpus", "4")
    assert finished.returncode == 0, finished.stderr
    assert "align runs one worker" in finished.stdout
    assert "on one GPU" in finished.stdout
    assert "load" not in finished.stdout  # a phase of a CPU alone


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpu-memory", "24XB"], "--gpu-memory '24XB' is no size"),
        (["base.model=./nowhere"], "is not a folder that exists"),
        (["adapters.layers=9"], "adapters.layers: 9"),
        (["ppo.update=1"], "did you mean ppo.updates?"),
    ],
)
def test_a_wrong_call_is_one_line_and_exit_code_2(tmp_path: Path, arguments: list[str], said: str) -> None:
    finished = align("plan", write_recipe(tmp_path), *arguments)
    assert finished.returncode == 2
    assert said in finished.stderr
    assert "Traceback" not in finished.stderr


def test_a_length_over_the_bases_context_is_planned_as_it_is_run(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    finished = align("plan", recipe, "sft.max_length=100000", "ppo.rollout.max_prompt_length=100000")
    assert "sft.max_length is 512, not 100000" in finished.stdout
    assert "max_prompt_length is 504, not 100000" in finished.stdout
    plans = [
        json.loads(align("plan", recipe, f"sft.max_length={length}", "--json").stdout) for length in (512, 100_000)
    ]
    assert plans[0] == plans[1]
    finished = align("plan", recipe, "ppo.rollout.max_response_length=512")
    assert (finished.returncode, "no prompt has room beside it" in finished.stderr) == (2, True)
