"""What a run's policy answered at each of its checkpoints: python -m tests.benchmarks.overoptimisation_looks RUN."""

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from align.adapters import AdaptedModel
from align.base import load_base
from align.context import RewardModelArtifacts, Sampling
from align.evaluation.run import Examiner, answer
from align.results import FinishedStep, read_finished
from align.rewards import load_reward_models, reward_sources
from align.sampler import Sampler
from align.settings import load
from data.sources import read_records
from data.tokenization import encode_prompts

PROMPTS, SAMPLES = 64, 4
POLICY = "policy"


@dataclass(frozen=True)
class Look:
    """Answers to the same held-out prompts with the same uniforms at each look, so that looks can be compared."""

    update: int
    golds: list[float]  # answer by answer; SAMPLES in a row are of one prompt
    scores: list[float]  # of the reward that the run was trained on, in standard deviations of SFT samples
    kls: list[float]  # to the reference, nats
    texts: list[str]


def look_at(run: Path) -> list[Look]:
    config = load(run / "config.yaml")
    model = AdaptedModel(load_base(config.base), config.adapters)
    codec = model.base.codec(config.data.system_prompt)
    model.load("sft", _finished(run, "sft").artifacts[0].path)
    reward = _finished(run, "reward")
    adapters, heads = ([a for a in reward.artifacts if a.kind == kind] for kind in ("adapter", "head"))
    artifacts = [RewardModelArtifacts(*pair) for pair in zip(adapters, heads, strict=True)]
    sources = reward_sources(config.ppo.rewards, load_reward_models(model, artifacts), model, codec)
    assert config.data.ppo is not None
    assert config.data.ppo.held_out is not None
    sampling = Sampling.of(config.ppo.rollout)
    records = read_records(config.data.ppo.held_out, "prompt").records[:PROMPTS]
    prompts, _ = encode_prompts(codec, records, max_prompt_length=sampling.max_prompt_length)
    examiner = Examiner(Sampler(model, codec, sampling, config.run.seed), sources, SAMPLES, has_gold=True)
    scale = sources.sources[0].scale  # an ensemble's is 0 and 1: its members are standardised one by one
    model.add(POLICY, copy_of="sft")
    looks = []
    for update, trained in _policies(run, model):
        for key, tensor in model.tensors(POLICY).items():
            tensor.data.copy_(trained[key])
        answers = answer(examiner, POLICY, prompts)
        scores = [(score - scale.mean) / scale.std for score in answers.scores]
        looks.append(Look(update, answers.golds, scores, answers.kls, answers.texts))
        print(f"update {update}", file=sys.stderr, flush=True)
    return looks


def _finished(run: Path, step: str) -> FinishedStep:
    finished = read_finished(run / step)
    assert finished is not None, f"{run}/{step} has not finished"
    return finished


def _policies(run: Path, model: AdaptedModel) -> Iterator[tuple[int, Mapping[str, Tensor]]]:
    """The policy's tensors by update: before the first, and at each checkpoint."""
    yield 0, {key: tensor.clone() for key, tensor in model.tensors("sft").items()}
    for folder in sorted((run / "ppo" / "checkpoints").glob("update-*")):
        tensors = load_file(folder / "trained.safetensors")
        own = {name.removeprefix(f"{POLICY}/"): tensor for name, tensor in tensors.items()}
        yield int(folder.name.removeprefix("update-")), own


if __name__ == "__main__":
    found = look_at(Path(sys.argv[1]))
    text = json.dumps([asdict(look) for look in found], ensure_ascii=False)
    (Path(sys.argv[1]) / "looks.json").write_text(text, encoding="utf-8")
