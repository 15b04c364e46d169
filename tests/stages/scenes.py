"""What a stage is called with, on tiny models and without Ray: contexts, records, artifacts made by hand."""

import json
from pathlib import Path

import torch

from align.adapters import AdaptedModel
from align.artifacts import Artifact, sha256_of_file, write_directory
from align.config import PPOConfig
from align.context import PPOInputs, RewardModelArtifacts, Sampling, StageContext
from align.heads import ScalarHead, ScoreStatistics, save_head
from align.randomness import stage_seed
from align.rewards import RewardModel, RewardSources, reward_sources
from align.tracking import Tracker
from data.records import Comparison, Demonstration, Message, Prompt, Verdict
from data.tokenization import TokenizedPrompt
from tests.resident import with_adapters

STATISTICS = ScoreStatistics(0.5, 2.0, 8)
SAMPLING = Sampling(temperature=1.0, max_response_length=6, max_prompt_length=200, batch_size=8)


def context_of(
    model: AdaptedModel, root: Path, stage: str, *, seed: int = 0, resume: bool = False, max_reject_rate: float = 0.0
) -> StageContext:
    folder = root / stage
    tracker = Tracker(folder, stage=stage, resume=resume)
    return StageContext(model, tracker, folder, stage_seed(seed, stage), None, max_reject_rate, resume)


def asked(text: str) -> tuple[Message, ...]:
    return (Message("user", text),)


def demonstration(question: str, answer: str) -> Demonstration:
    return Demonstration((*asked(question), Message("assistant", answer)), f"test:{question}")


def demonstrations(count: int, answer: str = "yes") -> tuple[Demonstration, ...]:
    return tuple(demonstration(f"q{i}", answer) for i in range(count))


def comparisons(count: int, *, chosen: str = "good", rejected: str = "bad", start: int = 0) -> tuple[Comparison, ...]:
    numbers = range(start, start + count)
    return tuple(Comparison(asked(f"q{i}"), f"{chosen} {i}", f"{rejected} {i}", f"test:{i}") for i in numbers)


def tokenized(*prompts: tuple[int, ...]) -> list[TokenizedPrompt]:
    return [TokenizedPrompt(ids, asked(f"prompt {n}"), f"test:{n}") for n, ids in enumerate(prompts)]


def reward_model_of(model: AdaptedModel, scale: ScoreStatistics = STATISTICS, *, seed: int = 1) -> RewardModel:
    """The adapter `reward` that is on the model, with a head of `seed`."""
    return RewardModel("reward", ScalarHead(model.hidden_size).initialize(seed), scale)


def sources_of(config: PPOConfig, model: AdaptedModel, *members: RewardModel) -> RewardSources:
    return reward_sources(config.rewards, members, model, model.base.codec(None))


def verdicts(count: int, *, start: int = 0) -> tuple[Verdict, ...]:
    """Of every three responses one is good."""
    numbers = range(start, start + count)
    return tuple(Verdict(asked(f"q{i}"), f"{'bad' if i % 3 else 'good'} {i}", i % 3 == 0, f"test:{i}") for i in numbers)


def prompts(count: int) -> tuple[Prompt, ...]:
    return tuple(Prompt(asked(f"say {'a' * i}"), f"test:{i}") for i in range(count))


def ppo_config(**sections: object) -> PPOConfig:
    """Three small updates of 8 episodes: 2 minibatches of 2 micro-batches of 2."""
    small: dict[str, object] = {
        "updates": 3,
        "checkpoints": {"every": 1, "keep_last": 9},
        "rollout": {"episodes": 8, "max_response_length": 6, "batch_size": 4, "max_prompt_length": 200},
        "loss": {"epochs": 2, "minibatches": 2, "micro_batch_size": 2},
        "rewards": {"missing_eos_penalty": 0.1},
        "optimizer": {"learning_rate": 1e-2},
    }
    for name, section in sections.items():
        own = small.get(name)
        small[name] = {**own, **section} if isinstance(own, dict) and isinstance(section, dict) else section
    return PPOConfig.model_validate(small)


def ppo_inputs(
    root: Path,
    shape: str = "llama",
    *,
    statistics: ScoreStatistics | None = STATISTICS,
    sft: bool = True,
    layers: object = "all",
) -> PPOInputs:
    """Artifacts as SFT and reward training would leave them, with random weights, and ten prompts."""
    made = with_adapters(shape, "sft", "reward", layers=layers)

    def write(stage: str, kind: str, fill: object) -> Artifact:
        path = root / "made" / stage / kind
        return write_directory(path, fill, kind=kind, stage=stage, step=1, base_identity=made.base_identity)  # type: ignore[arg-type]

    head = ScalarHead(made.hidden_size).initialize(1)
    reward_model = RewardModelArtifacts(
        adapter=write("reward", "adapter", lambda path: made.save("reward", path)),
        head=write("reward", "head", lambda path: save_head(head, path, statistics)),
    )
    sft_adapter = write("sft", "adapter", lambda path: made.save("sft", path)) if sft else None
    return PPOInputs(sft_adapter, (reward_model,), prompts(10))


def metrics_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def hashes_of(folder: Path) -> dict[str, str]:
    """Of all that must be reproducible in a stage's folder: not of clocks, and not of checkpoints."""
    return {
        path.relative_to(folder).as_posix(): sha256_of_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "timings.jsonl" and "checkpoints" not in path.parts
    }


def nudge(tensor: torch.Tensor) -> None:
    """Change a weight enough for any check to see it."""
    tensor.data.view(-1)[0] += 0.5
