"""Whether ours and transformers.generate draw from the same distribution: chi-square tests on a tiny random model.

Many answers of two tokens to one prompt. The first token is tested, and both together, which holds the second given
the first; some tokens end an answer, and then the second is `ENDED`. Two samples are compared with each other, and each
with the exact probabilities, from forward passes of the peer's model without a cache.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel

from align.adapters import AdaptedModel
from align.base import load_base
from align.config import AdaptersConfig, BaseModelConfig
from align.tiny import find_tiny
from tests.benchmarks.rollout_sides import POLICY, load_theirs, sample_ours, sample_theirs
from tests.benchmarks.rollout_task import Work, until_eos

SAMPLES = 20_000
SHAPE = "llama"
PROMPT = (60, 72, 61, 90, 77, 65, 81, 70)
EOS = tuple(range(40, 56))  # of some 260 tokens: many answers end at once, so slots are refilled out of step
ENDED = -1
BAR = 0.001
MINIMUM = 10.0  # expected in a bin, at least
ADAPTER_STD = 0.2  # wide, so that a side that left the adapter out would be seen
Outcome = tuple[int, ...]


@dataclass(frozen=True)
class Agreement:
    name: str
    p: float
    bins: int

    @property
    def is_held(self) -> bool:
        return self.p > BAR


def compare_distributions(folder: Path, samples: int = SAMPLES) -> list[Agreement]:
    ours, theirs = load_tiny(folder)
    work = Work([PROMPT], samples, 2, EOS, pad_id=0)
    pairs = {"ours": _pairs(sample_ours(ours, work)), "generate": _pairs(sample_theirs(theirs, work))}
    exact = exact_pairs(theirs, PROMPT, frozenset(EOS))
    tests: list[Agreement] = []
    for tokens, what in ((1, "first token"), (2, "first and second")):
        seen = {side: Counter(pair[:tokens] for pair in own) for side, own in pairs.items()}
        tests.append(two_samples(f"{what}: ours and generate", seen["ours"], seen["generate"]))
        probabilities = _marginal(exact, tokens)
        tests += [one_sample(f"{what}: {side} and the softmax", own, probabilities) for side, own in seen.items()]
    return tests


def load_tiny(folder: Path) -> tuple[AdaptedModel, PeftModel]:
    """Both sides' models, with the same random policy."""
    model = AdaptedModel(load_base(BaseModelConfig(model=f"tiny:{SHAPE}", device="cpu")), AdaptersConfig())
    model.add(POLICY)
    generator = torch.Generator().manual_seed(0)
    for tensor in model.tensors(POLICY).values():
        tensor.data.normal_(std=ADAPTER_STD, generator=generator)
    folder.mkdir(parents=True, exist_ok=True)
    model.save(POLICY, folder)
    return model, load_theirs(find_tiny(SHAPE), folder, "float32")


def two_samples(name: str, first: Mapping[Outcome, int], second: Mapping[Outcome, int]) -> Agreement:
    """χ² = Σ (a √(M/N) − b √(N/M))² / (a + b) of N and M draws, with one degree of freedom less than bins."""
    n, m = sum(first.values()), sum(second.values())
    both = {outcome: first.get(outcome, 0) + second.get(outcome, 0) for outcome in {*first, *second}}
    bins = pool({outcome: count * min(n, m) / (n + m) for outcome, count in both.items()})
    statistic = 0.0
    for outcomes in bins:
        a, b = (sum(sample.get(outcome, 0) for outcome in outcomes) for sample in (first, second))
        statistic += (a * (m / n) ** 0.5 - b * (n / m) ** 0.5) ** 2 / (a + b)
    return Agreement(name, upper_tail(statistic, len(bins) - 1), len(bins))


def one_sample(name: str, seen: Mapping[Outcome, int], probabilities: Mapping[Outcome, float]) -> Agreement:
    """Pearson's χ². What cannot be drawn, but was, gives p = 0."""
    n = sum(seen.values())
    if any(count and probabilities.get(outcome, 0.0) == 0.0 for outcome, count in seen.items()):
        return Agreement(name, 0.0, 0)
    bins = pool({outcome: n * p for outcome, p in probabilities.items()})
    statistic = 0.0
    for outcomes in bins:
        expected = n * sum(probabilities[outcome] for outcome in outcomes)
        statistic += (sum(seen.get(outcome, 0) for outcome in outcomes) - expected) ** 2 / expected
    return Agreement(name, upper_tail(statistic, len(bins) - 1), len(bins))


def pool(expected: Mapping[Outcome, float]) -> list[list[Outcome]]:
    """Bins of at least `MINIMUM`: the likely outcomes alone, rare ones together, from the likeliest down."""
    bins: list[list[Outcome]] = []
    filling: list[Outcome] = []
    total = 0.0
    for outcome in sorted(expected, key=lambda outcome: (-expected[outcome], outcome)):
        filling.append(outcome)
        total += expected[outcome]
        if total >= MINIMUM:
            bins.append(filling)
            filling, total = [], 0.0
    if bins:
        bins[-1] += filling
    return bins


def upper_tail(statistic: float, freedom: int) -> float:
    """P(χ² ≥ statistic)."""
    halves = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return torch.special.gammaincc(halves[0], halves[1]).item()


@torch.no_grad()
def exact_pairs(model: PeftModel, prompt: Outcome, eos: frozenset[int]) -> dict[Outcome, float]:
    """The probability of every pair of tokens after the prompt, or of one that ends it and `ENDED`."""
    first_V = _next_probabilities(model, torch.tensor([prompt]))[0]
    ids_VS = torch.tensor([[*prompt, token] for token in range(len(first_V))])
    both_VV = first_V[:, None] * _next_probabilities(model, ids_VS)
    exact: dict[Outcome, float] = {}
    for token, (p, row) in enumerate(zip(first_V.tolist(), both_VV.tolist(), strict=True)):
        exact |= {(token, ENDED): p} if token in eos else {(token, second): q for second, q in enumerate(row)}
    return exact


def _next_probabilities(model: PeftModel, ids_BS: torch.Tensor) -> torch.Tensor:
    return torch.softmax(model(input_ids=ids_BS, use_cache=False).logits[:, -1].double(), dim=-1)


def _pairs(answers: Iterable[Iterable[int]]) -> list[Outcome]:
    real = [until_eos(tuple(ids), frozenset(EOS)) for ids in answers]
    return [ids if len(ids) == 2 else (*ids, ENDED) for ids in real]


def _marginal(exact: Mapping[Outcome, float], tokens: int) -> dict[Outcome, float]:
    sums: dict[Outcome, float] = {}
    for outcome, p in exact.items():
        sums[outcome[:tokens]] = sums.get(outcome[:tokens], 0.0) + p
    return sums
