"""Did alignment work? SFT and PPO answer the same held-out prompts with the same keyed uniforms, side by side."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch

from align.config import EvaluationConfig
from align.context import EvaluationInputs, StageContext, StageResult
from align.evaluation.gold import base_nll, gold_score
from align.rewards import RewardSources, judge, load_reward_models, reward_sources
from align.sampler import Sampler
from align.statistics import bootstrap_interval
from data.tokenization import TokenizedPrompt, decode_response, encode_prompts

_ROLES = {"sft": "sft", "ppo": "policy"}  # the report's name of a side, and its adapter


@dataclass(frozen=True)
class Answers:
    """One side's answers, prompt by prompt: entry n is answer n % samples to prompt n // samples."""

    texts: list[str]
    scores: list[float]  # the weighted sum of the reward sources'
    nlls: list[float]  # of the raw base, nats a token
    golds: list[float]  # empty if the task has no gold
    kls: list[float]  # k1 to the reference, nats a response
    lengths: list[float]  # tokens
    ended: list[float]  # 1 where the answer has EOS


def run_evaluation(config: EvaluationConfig, inputs: EvaluationInputs, context: StageContext) -> StageResult:
    """Compare SFT and PPO on held-out prompts; every interval is a bootstrap over prompts."""
    model = context.model
    codec = model.base.codec(context.system_prompt)
    sampling = context.fitting_sampling(inputs.sampling)
    chosen = inputs.prompts[: config.prompts]
    prompts, rejects = encode_prompts(
        codec, chosen, max_prompt_length=sampling.max_prompt_length, on_progress=context.progress("tokenizing")
    )
    account = context.set_aside("held_out", len(chosen), rejects)
    context.load_sft(inputs.sft)
    model.load("policy", inputs.policy.path)
    members = load_reward_models(model, inputs.reward_models)
    sources = reward_sources(inputs.rewards, members, model, codec)

    sampler = Sampler(model, codec, sampling, context.seed)
    examiner = Examiner(sampler, sources, config.samples, has_gold=config.gold is not None)
    sides: dict[str, Answers] = {}
    told = context.progress("answering held-out prompts")
    for number, (side, role) in enumerate(_ROLES.items()):

        def on_progress(done: int, total: int, number: int = number) -> None:
            told(number * total + done, len(_ROLES) * total)

        sides[side] = answer(examiner, role, prompts, on_progress)
    metrics = compare(sides["sft"], sides["ppo"], samples=config.samples, seed=context.seed)
    metrics["samples"] = [
        {
            "prompt": prompts[i].messages[-1].content,
            "sft": sides["sft"].texts[i * config.samples],
            "ppo": sides["ppo"].texts[i * config.samples],
        }
        for i in range(min(config.show, len(prompts)))
    ]
    return StageResult("evaluation", (), metrics, account)


@dataclass(frozen=True)
class Examiner:
    """All that answers are drawn and judged with, the same for both sides."""

    sampler: Sampler
    sources: RewardSources
    samples: int  # answers to each prompt
    has_gold: bool


@torch.no_grad()
def answer(
    examiner: Examiner,
    role: str,
    prompts: Sequence[TokenizedPrompt],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Answers:
    """Answers of `role` to each prompt, and what reference, reward sources, raw base and gold say of them."""
    sampler = examiner.sampler
    model, codec = sampler.model, sampler.codec
    episodes = sampler.episodes(
        prompts, role=role, purpose="evaluation", each=examiner.samples, on_progress=on_progress
    )
    batch_size = sampler.sampling.batch_size
    by_name, kls_N = judge(sampler, episodes, examiner.sources, role=role, reference="sft", batch_size=batch_size)
    scores, kls = examiner.sources.total(by_name).tolist(), kls_N.tolist()
    texts = [decode_response(codec, e.response_ids).strip() for e in episodes]
    nlls = base_nll(model, codec, [e.prompt_ids for e in episodes], [e.response_ids for e in episodes])
    golds = [gold_score(text, nll) for text, nll in zip(texts, nlls, strict=True)] if examiner.has_gold else []
    ended = [float(e.has_eos) for e in episodes]
    return Answers(texts, scores, nlls, golds, kls, [float(len(e.response_ids)) for e in episodes], ended)


def compare(sft: Answers, ppo: Answers, *, samples: int, seed: int) -> dict[str, object]:
    """The report's numbers. Differences and wins are taken answer by answer: both sides drew the same uniforms."""
    metrics: dict[str, object] = {}

    def put(name: str, values: list[float]) -> None:
        metrics[name] = fmean(values)
        means = [fmean(values[i : i + samples]) for i in range(0, len(values), samples)]
        metrics[f"{name}_ci95"] = list(bootstrap_interval(means, seed=seed))

    def gain(before: list[float], after: list[float]) -> list[float]:
        return [b - a for a, b in zip(before, after, strict=True)]

    for side, own in (("sft", sft), ("ppo", ppo)):
        put(f"score_{side}", own.scores)
        put(f"length_{side}", own.lengths)
        put("eos_rate" if side == "ppo" else "eos_rate_sft", own.ended)
        if own.golds:
            put(f"gold_{side}", own.golds)
    put("kl", ppo.kls)
    put("score_gain", gain(sft.scores, ppo.scores))
    judged = (sft.golds, ppo.golds) if sft.golds else (sft.scores, ppo.scores)
    put("win_rate", [0.5 + 0.5 * ((d > 0) - (d < 0)) for d in gain(*judged)])
    metrics["win_rate_judge"] = "gold" if sft.golds else "reward"
    if sft.golds:
        put("gold_gain", gain(sft.golds, ppo.golds))
    for name, before, after in (
        ("nll_ratio", _per_token(sft), _per_token(ppo)),
        ("distinct2_ratio", distinct_2(sft.texts), distinct_2(ppo.texts)),
    ):
        metrics[name] = after / before if before > 0 else None  # no token but the end, or no two words
    metrics["num_answers"] = len(ppo.texts)
    return metrics


def _per_token(answers: Answers) -> float:
    """The raw base's NLL per token over all answers together, each weighted by its length with the end token."""
    total = sum(nll * length for nll, length in zip(answers.nlls, answers.lengths, strict=True))
    return total / sum(answers.lengths)


def distinct_2(texts: list[str]) -> float:
    """Distinct-2 (Li et al. 2016): different word pairs over all word pairs, of all texts together; 0 if there are
    none."""
    pairs = [pair for text in texts for pair in zip(text.split(), text.split()[1:], strict=False)]
    return len(set(pairs)) / len(pairs) if pairs else 0.0
