"""Fresh answers to held-out prompts by a trained policy, whichever system trained it: one sampler, reward and KL."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from align.adapters import AdaptedModel
from align.context import Sampling
from align.episodes import Episode, collate, policy_pass
from align.generation import generate
from align.randomness import keyed_uniforms
from data.batching import length_sorted_batches
from data.tokenization import encode_prompts
from tests.benchmarks.parity_ours import records, resident
from tests.benchmarks.parity_recipe import Job
from tests.benchmarks.parity_task import make_tokenizer, prompts, row_scorer

SAMPLES = 2  # a prompt
REFERENCE, POLICY = "sft", "policy"


@dataclass(frozen=True)
class Outcome:
    reward: float
    kl: float  # k1 to the base, summed over a response, nats
    eos_rate: float
    length: float  # tokens


def evaluate(job: Job, adapter: Path | None) -> Outcome:
    """With the same uniforms for both systems' policies of one seed. No adapter: the base itself."""
    model = resident(job)
    model.add(REFERENCE)
    if adapter is None:
        model.add(POLICY, copy_of=REFERENCE)
    else:
        model.load(POLICY, adapter)
    episodes = _answers(model, job)
    with torch.no_grad():
        kls = _kls(model, job, episodes)
    score = row_scorer(make_tokenizer())
    count = len(episodes)
    return Outcome(
        reward=sum(score([*e.prompt_ids, *e.response_ids]) for e in episodes) / count,
        kl=sum(kls) / count,
        eos_rate=sum(e.has_eos for e in episodes) / count,
        length=sum(len(e.response_ids) for e in episodes) / count,
    )


def _answers(model: AdaptedModel, job: Job) -> list[Episode]:
    codec = model.base.codec(None)
    sampling = Sampling(job.recipe.temperature, job.recipe.response_length, max_prompt_length=64, batch_size=128)
    tokenized, _ = encode_prompts(codec, records(prompts()[1]), max_prompt_length=64)
    ids = [prompt.ids for prompt in tokenized] * SAMPLES
    uniforms_BT = keyed_uniforms(job.seed, "parity evaluation", 0, list(range(len(ids))), sampling.max_response_length)
    with model.role(POLICY):
        responses = generate(model, codec, ids, sampling=sampling, uniforms_BT=uniforms_BT)
    return [Episode(p, r.ids, r.has_eos, r.logprobs) for p, r in zip(ids, responses, strict=True)]


def _kls(model: AdaptedModel, job: Job, episodes: list[Episode]) -> list[float]:
    pad_id, temperature = model.base.codec(None).pad_id, job.recipe.temperature
    kls: list[float] = []
    for group in length_sorted_batches([len(e.prompt_ids) + len(e.response_ids) for e in episodes], 128):
        batch = collate([episodes[i] for i in group], pad_id=pad_id, device=model.device)
        with model.role(POLICY):
            logprobs_BT = policy_pass(model, batch, temperature=temperature).logprobs_BT
        with model.role(REFERENCE):
            reference_BT = policy_pass(model, batch, temperature=temperature).logprobs_BT
        kls += (logprobs_BT - reference_BT).sum(-1).tolist()
    return kls


def evaluated(job: Job, folder: Path) -> Outcome:
    """`evaluate` of a finished run, kept beside it."""
    path = folder / "evaluation.json"
    if not path.is_file():
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        path.write_text(json.dumps(vars(evaluate(job, Path(result["adapter"])))), encoding="utf-8")
    return Outcome(**json.loads(path.read_text(encoding="utf-8")))
