"""What `rollout` has both sides do, how long answers get by themselves, and which bars their rates face."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tests.benchmarks.ppo_update_bars import Verdict

SLOTS = 64
FIRST_EOS = 2  # of the ids that end an answer where lengths vary: 0 and 1 are <pad> and <unk>
OURS, GENERATE, BATCHES = "ours", "generate", "generate_batch"
SIDES = {OURS: "ours", GENERATE: "transformers.generate", BATCHES: "its generate_batch"}


@dataclass(frozen=True)
class Scenario:
    title: str
    prompts: int  # different ones
    per_prompt: int  # answers
    max_tokens: int
    mean_tokens: float  # max_tokens: no answer can end before
    bar: float  # times the tokens/s of transformers.generate
    goal: float


SCENARIOS = {
    "fixed": Scenario("64 tokens each", SLOTS, 1, 64, 64, 1.25, 2.0),
    "variable": Scenario("at most 96 tokens, mean 32", 4 * SLOTS, 1, 96, 32, 2.0, 4.0),
    "four": Scenario("64 tokens each, 4 answers a prompt", SLOTS // 4, 4, 64, 64, 1.25, 2.0),
}


@dataclass(frozen=True)
class Work:
    prompts: list[tuple[int, ...]]
    per_prompt: int
    max_tokens: int
    eos_ids: tuple[int, ...]
    pad_id: int
    seed: int = 0


@dataclass(frozen=True)
class Run:
    seconds: float
    lengths: list[int]  # of each answer, its EOS included and what pads it left out

    @property
    def tokens_per_second(self) -> float:
        return sum(self.lengths) / self.seconds


Runs = Mapping[tuple[str, str, str], Sequence[Run]]  # by scenario, dtype and side


def ending_rate(max_tokens: int, mean_tokens: float) -> float:
    """The chance p to end at each token that gives this mean: Σ_{t < max} (1 − p)^t = mean, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        mean = (1 - (1 - middle) ** max_tokens) / middle
        low, high = (middle, high) if mean > mean_tokens else (low, middle)
    return (low + high) / 2


def eos_ids(scenario: Scenario, vocabulary: int) -> tuple[int, ...]:
    """Enough ids to end answers at the scenario's mean; or the one id that no logit belongs to, which never does.

    A random model gives each token about the same chance, so it matters how many ids there are and not which.
    """
    if scenario.mean_tokens == scenario.max_tokens:
        return (vocabulary,)
    count = round(ending_rate(scenario.max_tokens, scenario.mean_tokens) * vocabulary)
    return tuple(range(FIRST_EOS, FIRST_EOS + count))


def until_eos(ids: Sequence[int], eos: frozenset[int]) -> tuple[int, ...]:
    """An answer without the padding after its EOS, which it keeps."""
    end = next((place for place, token in enumerate(ids) if token in eos), len(ids) - 1)
    return tuple(ids[: end + 1])


def best(runs: Sequence[Run]) -> Run:
    """Others on the machine only ever make a run slower."""
    return max(runs, key=lambda run: run.tokens_per_second)


def judge(runs: Runs) -> list[Verdict]:
    """Ours over transformers.generate, best against best, in each scenario and dtype."""
    verdicts: list[Verdict] = []
    for (name, dtype, side), own in runs.items():
        if side == OURS:
            scenario = SCENARIOS[name]
            ratio = best(own).tokens_per_second / best(runs[name, dtype, GENERATE]).tokens_per_second
            title = f"tokens/s, {scenario.title}, {dtype}"
            verdicts.append(Verdict(title, ratio, scenario.bar, scenario.goal, ratio >= scenario.bar))
    return verdicts
