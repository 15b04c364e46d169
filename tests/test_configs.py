"""Every recipe in configs/ parses, and one small step of each of its stages runs: the real driver and stages, with
the base and the hub's data replaced by tiny ones of the same shape, and a worker in this process instead of Ray's."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from align import settings
from align.adapters import AdaptedModel
from align.base import load_base
from align.config import Config, OptimizerConfig, PPOConfig, RewardConfig, RolloutConfig, SourceConfig
from align.context import StageContext
from align.driver import run_pipeline
from align.pipeline import RunCall
from align.randomness import stage_seed
from align.results import Vitals
from align.show import QuietDisplay
from align.steps import STAGE_FUNCTIONS
from align.tiny import find_tiny
from align.tracking import Tracker
from align.worker import Outcome, StageCall

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
Rows = list[dict[str, object]]

# A base's stand-in. "bare" has Llama's shape and, as a base model, no chat template.
STAND_INS = {
    "embedded": "tiny:llama",
    "tiny:llama": "tiny:llama",
    "Qwen/Qwen2.5-0.5B-Instruct": "tiny:qwen2",
    "HuggingFaceTB/SmolLM2-360M-Instruct": "tiny:llama",
    "HuggingFaceTB/SmolLM2-360M": "bare",
}
SMALL = {
    "sft": ("epochs=1", "batch_size=4", "micro_batch_size=2", "max_length=400"),
    "reward": ("epochs=1", "batch_size=4", "micro_batch_size=2", "max_length=400"),
    "ppo": (
        "updates=1",
        "rollout.episodes=8",
        "rollout.max_prompt_length=400",
        "rollout.max_response_length=8",
        "loss.minibatches=2",
        "loss.micro_batch_size=2",
    ),
}


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def conversations() -> Rows:
    def turns(i: int) -> list[dict[str, str]]:
        return [turn("user", f"q{i}"), turn("assistant", "yes"), turn("user", "why"), turn("assistant", f"so {i}")]

    return [{"source": "test", "messages": turns(i), "num_turns": 2} for i in range(4)]


def pairs_with_the_prompt_inside() -> Rows:
    def side(i: int, answer: str) -> list[dict[str, str]]:
        return [turn("user", f"q{i}"), turn("assistant", answer)]

    return [
        {"chosen": side(i, f"good {i}"), "rejected": side(i, f"bad {i}"), "score_chosen": 8.0, "score_rejected": 3.0}
        for i in range(4)
    ]


def pairs_beside_a_conversation() -> Rows:
    def prompt(i: int) -> list[dict[str, str]]:
        return [turn("user", f"q{i}"), turn("assistant", "yes"), turn("user", "why")][-1 - 2 * (i % 2) :]

    return [
        {"chosen": [turn("assistant", "good")], "rejected": [turn("assistant", "bad")], "prompt": prompt(i)}
        for i in range(4)
    ]


def post(i: int) -> str:
    return f"SUBREDDIT: r/test\n\nTITLE: t{i}\n\nPOST: p\n\nTL;DR:"


# What the hub's data sets hold: their splits, and rows of the same columns.
HUB: dict[str, tuple[set[str], Rows]] = {
    "trl-lib/Capybara": ({"train", "test"}, conversations()),
    "trl-lib/ultrafeedback_binarized": ({"train", "test"}, pairs_with_the_prompt_inside()),
    "trl-lib/ultrafeedback-prompt": ({"train", "test"}, [{"prompt": [turn("user", f"q{i}")]} for i in range(4)]),
    "trl-lib/hh-rlhf-helpful-base": ({"train", "test"}, pairs_beside_a_conversation()),
    "trl-lib/tldr": (
        {"train", "validation", "test"},
        [{"prompt": post(i), "completion": f" short {i}"} for i in range(4)],
    ),
    "trl-lib/tldr-preference": (
        {"train", "validation"},
        [{"prompt": post(i), "chosen": f" short {i}", "rejected": f" long {i}"} for i in range(4)],
    ),
}


class WorkerInThisProcess:
    """Stands in for align.cluster.Cluster: the calls run here, on one resident model."""

    def __init__(self, config: Config, **_: object) -> None:
        self._model = AdaptedModel(load_base(config.base), config.adapters)

    def close(self) -> None: ...

    def start(self) -> None: ...

    def end_if_stopped(self) -> None: ...

    def run(self, call: StageCall) -> Outcome:
        self._model.reset()
        tracker = Tracker(call.folder, stage=call.step)
        seed = stage_seed(call.run_seed, call.step)
        context = StageContext(self._model, tracker, call.folder, seed, call.system_prompt, call.max_reject_rate)
        result = call.function(call.config, call.inputs, context)
        return Outcome(result, Vitals(0.0, 1, None, 1, True, "float32", 0))


@pytest.fixture
def bare(tmp_path: Path) -> str:
    folder = tmp_path / "bare"
    shutil.copytree(find_tiny("llama"), folder)
    (folder / "chat_template.jinja").unlink()
    return str(folder)


def stand_in_data(key: str, source: SourceConfig, folder: Path) -> str:
    """The override that puts a few local rows in a source's place."""
    if source.path is not None:
        return f"{key}.limit=4"
    assert source.hub in HUB, f"{key}: say in HUB what {source.hub} holds"
    splits, rows = HUB[source.hub]
    assert source.split in splits
    assert source.subset is None
    path = folder / f"{key}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"{key}={{path: {path}}}"


def small_overrides(config: Config, folder: Path, *, bare: str) -> list[str]:
    """Overrides that leave all of a recipe's own keys in force, except for sizes and places."""
    model = STAND_INS[config.base.model]
    overrides = [f"run.root={folder / 'runs'}", f"base.model={bare if model == 'bare' else model}"]
    for stage in config.run.stages:
        data = getattr(config.data, stage)
        for side in ("train", "held_out"):
            source: SourceConfig | None = getattr(data, side)
            assert source is not None, f"data.{stage}.{side}: a recipe names its held-out data"
            overrides.append(stand_in_data(f"data.{stage}.{side}", source, folder))
        overrides += [f"{stage}.{size}" for size in SMALL[stage]]
    return [*overrides, "evaluation.prompts=2", "evaluation.samples=1"]


def test_there_are_recipes() -> None:
    assert {path.stem for path in CONFIGS} >= {"quickstart", "tiny", "ultrafeedback", "hh-rlhf", "tldr"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_recipe_parses_and_is_named_like_its_file(path: Path) -> None:
    config = settings.load(path)
    assert config.run.name == path.stem
    assert config.base.model in STAND_INS, "give this base a stand-in"
    if "/" in config.base.model:
        assert (config.base.dtype, config.base.device) == ("bfloat16", "auto")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_one_small_step_of_each_stage_of_a_recipe_runs(
    path: Path, tmp_path: Path, bare: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("align.driver.Cluster", WorkerInThisProcess)
    recipe = settings.load(path)
    config = settings.load(path, small_overrides(recipe, tmp_path, bare=bare))
    summary: Any = run_pipeline(config, RunCall("align run"), stages=STAGE_FUNCTIONS, display=QuietDisplay())
    assert summary["run"]["steps"] == [*recipe.run.stages, "evaluation"]
    for stage in recipe.run.stages:
        metrics = config.run.folder / stage / "metrics.jsonl"
        steps = {json.loads(line)["step"] for line in metrics.read_text().splitlines()}
        assert max(steps) == 1
        result = json.loads((config.run.folder / stage / "result.json").read_text())
        assert [account["rejected"] for account in result["accounts"].values()] == [[]] * len(result["accounts"])
    assert summary["ppo"]["first_step_kl"] == 0.0
    assert summary["ppo"]["first_minibatch_ratio_error"] == 0.0
    assert len(summary["eval"]["samples"]) == min(2, recipe.evaluation.show)


def test_the_readme_explains_every_setting_of_reward_modelling_and_ppo() -> None:
    """Those that are there to be chosen; sizes, rates and seeds explain themselves in the config."""
    plain = {
        *("updates", "rollout", "optimizer", "epochs", "minibatches"),
        *("micro_batch_size", "coefficient", "learning_rate", "batch_size", "prompts", "ptx_batch_size"),
        *("ptx_max_length", "max_length", "gradient_checkpointing", "schedule", "warmup_fraction", "adapter"),
    }
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    named = [*PPOConfig.model_fields, *RewardConfig.model_fields]
    for section in (PPOConfig(), RewardConfig()):
        for _, inner in section:
            if isinstance(inner, BaseModel) and not isinstance(inner, RolloutConfig | OptimizerConfig):
                named += type(inner).model_fields
    missing = [name for name in named if name not in plain and name not in readme]
    assert missing == []
