"""Generated tokens a second, ours against transformers' `generate` and `generate_batch`, SmolLM2-135M's shape.

One policy, a random LoRA adapter of rank 16 on all linear layers of a random base; prompts of 48 tokens, 64 slots,
temperature 1, no truncation of the distribution. All three are loaded in this process and take turns; each is judged by
the best of its repeats. Theirs is PEFT on a freshly loaded model, as it comes. Answers of a fixed length have an EOS id
that no logit belongs to, which costs no side anything (a minimum length would cost both a mask over the vocabulary).
Where lengths vary, three percent of the vocabulary are EOS ids, so that answers end at random; `generate` takes the
256 prompts in four batches, each until its longest answer has ended. Only real tokens count, up to and with the EOS.

The bars are against `generate`: 1.25 times its tokens/s where all answers are of one length, also with four answers a
prompt (`num_return_sequences`), and twice where lengths vary. `generate_batch`, transformers' continuous batching, is
timed once beside them. On a CPU its rows attend in one sequence with a mask in which each row sees its own keys, so its
attention costs 64 times what is needed.

In float32; and in bfloat16, too, where the machine's matrix product is faster in it. That the same distribution is
sampled is tested apart (rollout_distribution), on a tiny model with fixed seeds: every p must be over 0.001.
"""

import json
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import cast

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tests.benchmarks.keep import keep
from tests.benchmarks.machine import best_matrix_rate
from tests.benchmarks.ppo_update_bars import Verdict, dtypes_to_measure
from tests.benchmarks.ppo_update_prepare import prepare
from tests.benchmarks.ppo_update_task import BASE, PROMPTS, SFT, Shape, Task
from tests.benchmarks.rollout_distribution import Agreement, compare_distributions
from tests.benchmarks.rollout_sides import Sample, load_sides, time_run
from tests.benchmarks.rollout_task import (
    BATCHES,
    GENERATE,
    OURS,
    SCENARIOS,
    SIDES,
    SLOTS,
    Run,
    Runs,
    Scenario,
    Work,
    best,
    eos_ids,
    judge,
)

REPEATS = 2
CORES = os.cpu_count() or 1
TASK = Task(updates=1, episodes=4 * SLOTS)  # as many prompts as the scenario with the most of them needs


def run(root: Path) -> int:
    torch.set_num_threads(CORES)
    transformers.logging.set_verbosity_error()
    rates = {dtype: best_matrix_rate(dtype) for dtype in ("float32", "bfloat16")}
    agreements = compare_distributions(root / "distribution")
    prepare(root / "prepared", Shape(), TASK)
    runs: dict[tuple[str, str, str], list[Run]] = {}
    for dtype in dtypes_to_measure(rates):
        sides = load_sides(root / "prepared" / BASE, root / "prepared" / SFT, dtype)
        for (name, side), own in time_sides(sides, read_prompts(root / "prepared"), Shape.vocabulary).items():
            runs[name, dtype, side] = own
    verdicts = judge(runs)
    _print(runs, rates)
    _print_verdicts(verdicts, agreements)
    result = {
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "matrix_rates": rates,
        "shape": asdict(Shape()),
        "scenarios": {name: asdict(scenario) for name, scenario in SCENARIOS.items()},
        "runs": {" ".join(key): [_summary(each) for each in own] for key, own in runs.items()},
        "agreements": [asdict(agreement) for agreement in agreements],
        "verdicts": [asdict(verdict) for verdict in verdicts],
    }
    keep("rollout", result)
    return 0 if all(each.is_held for each in (*verdicts, *agreements)) else 1


def read_prompts(prepared: Path) -> list[tuple[int, ...]]:
    tokenizer = cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(prepared / BASE))
    texts = json.loads((prepared / PROMPTS).read_text(encoding="utf-8"))
    return [tuple(cast(list[int], tokenizer(text)["input_ids"])) for text in texts]


def make_work(scenario: Scenario, prompts: list[tuple[int, ...]], vocabulary: int) -> Work:
    eos = eos_ids(scenario, vocabulary)
    return Work(prompts[: scenario.prompts], scenario.per_prompt, scenario.max_tokens, eos, pad_id=0)


def time_sides(
    sides: Mapping[str, Sample], prompts: list[tuple[int, ...]], vocabulary: int
) -> dict[tuple[str, str], list[Run]]:
    """Each repeat of a side does the same work, since seeds are the same: it differs by the machine's noise alone."""
    runs: dict[tuple[str, str], list[Run]] = {}
    for name, scenario in SCENARIOS.items():
        work = make_work(scenario, prompts, vocabulary)
        for side in sides:
            time_run(sides[side], replace(work, prompts=prompts[:2], max_tokens=2))  # the first call pays for threads
        for side in (*(OURS, GENERATE) * REPEATS, BATCHES):
            print(f"{scenario.title}: {SIDES[side]} ...", end=" ", file=sys.stderr, flush=True)
            own = time_run(sides[side], work)
            print(f"{own.seconds:.1f} s", file=sys.stderr, flush=True)
            if scenario.mean_tokens == scenario.max_tokens and {*own.lengths} != {scenario.max_tokens}:
                raise RuntimeError(f"{SIDES[side]}: lengths {own.lengths}, all were to be {scenario.max_tokens}")
            runs.setdefault((name, side), []).append(own)
    return runs


def _summary(own: Run) -> dict[str, float]:
    return {
        "seconds": own.seconds,
        "tokens": sum(own.lengths),
        "mean_length": fmean(own.lengths),
        "tokens_per_second": own.tokens_per_second,
    }


def _print(runs: Runs, rates: Mapping[str, float]) -> None:
    console = Console()
    products = ", ".join(f"{dtype} {rate / 1e9:.0f} GFLOP/s" for dtype, rate in rates.items())
    console.print(f"best matrix product with {CORES} threads: {products}")
    table = Table("answers", "dtype", "", "tokens", "mean length", "seconds", "tokens/s")
    for (name, dtype, side), own in runs.items():
        fastest = best(own)
        seconds = ", ".join(f"{each.seconds:.1f}" for each in own)
        counts = (str(sum(fastest.lengths)), f"{fmean(fastest.lengths):.1f}")
        table.add_row(SCENARIOS[name].title, dtype, SIDES[side], *counts, seconds, f"{fastest.tokens_per_second:.0f}")
    console.print(table)


def _print_verdicts(verdicts: Iterable[Verdict], agreements: Iterable[Agreement]) -> None:
    table = Table("ours / transformers.generate", "ratio", "bar", "held", "goal", "of the goal")
    for verdict in verdicts:
        assert verdict.goal is not None
        held = "yes" if verdict.is_held else "NO"
        share = f"{verdict.value / verdict.goal:.0%}"
        table.add_row(verdict.name, f"{verdict.value:.2f}", f"{verdict.bar:g}", held, f"{verdict.goal:g}", share)
    Console().print(table)
    tests = Table("the same distribution", "p", "bins", "held")
    for agreement in agreements:
        row = (f"{agreement.p:.4f}", str(agreement.bins), "yes" if agreement.is_held else "NO")
        tests.add_row(agreement.name, *row)
    Console().print(tests)
