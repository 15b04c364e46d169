"""What rollout concludes from rates and counts that are known, and that each side samples what it is meant to."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import Linear as PeftLinear
from transformers import PreTrainedModel

from align.adapters import AdaptedModel
from tests.benchmarks.ppo_update_prepare import prepare
from tests.benchmarks.ppo_update_task import BASE, SFT, Shape, Task
from tests.benchmarks.rollout import TASK, make_work, read_prompts, time_sides
from tests.benchmarks.rollout_distribution import (
    ENDED,
    EOS,
    PROMPT,
    Outcome,
    compare_distributions,
    exact_pairs,
    load_tiny,
    one_sample,
    pool,
    two_samples,
    upper_tail,
)
from tests.benchmarks.rollout_sides import (
    Sample,
    load_ours,
    load_theirs,
    sample_in_batches,
    sample_ours,
    sample_theirs,
    time_run,
)
from tests.benchmarks.rollout_task import (
    BATCHES,
    GENERATE,
    OURS,
    SCENARIOS,
    Run,
    Work,
    best,
    ending_rate,
    eos_ids,
    judge,
    until_eos,
)

SMALL = Shape(vocabulary=300, width=32, intermediate=64, layers=2, heads=4, kv_heads=2)


def runs(*rates: float) -> list[Run]:
    return [Run(100 / rate, [60, 40]) for rate in rates]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    prepare(folder, SMALL, replace(TASK, prompt_length=5, rank=4))
    return folder


@pytest.fixture(scope="module")
def ours(prepared: Path) -> AdaptedModel:
    return load_ours(str(prepared / BASE), prepared / SFT, "float32")


@pytest.fixture(scope="module")
def theirs(prepared: Path) -> PeftModel:
    return load_theirs(prepared / BASE, prepared / SFT, "float32")


def test_the_ending_rate_gives_the_mean_length() -> None:
    rate = ending_rate(96, 32)
    assert sum((1 - rate) ** token for token in range(96)) == pytest.approx(32)
    assert ending_rate(2, 1.5) == pytest.approx(0.5)  # 1 + (1 − p)


def test_every_eos_id_can_be_drawn_where_lengths_vary_and_none_where_they_are_fixed() -> None:
    varied = eos_ids(SCENARIOS["variable"], 10_000)
    assert len(set(varied)) == round(10_000 * ending_rate(96, 32))
    assert min(varied) > 1
    assert max(varied) < 10_000
    assert eos_ids(SCENARIOS["fixed"], 10_000) == (10_000,)


@pytest.mark.parametrize(
    ("ids", "real"),
    [((5, 9, 0, 0), (5, 9)), ((9, 9, 9), (9,)), ((5, 6, 7), (5, 6, 7)), ((5, 6, 8), (5, 6, 8)), ((), ())],
)
def test_an_answer_ends_with_its_first_eos(ids: tuple[int, ...], real: tuple[int, ...]) -> None:
    assert until_eos(ids, frozenset({8, 9})) == real


def test_rates_count_real_tokens_and_the_best_repeat_is_the_fastest() -> None:
    assert Run(4.0, [3, 5]).tokens_per_second == 2.0
    assert best(runs(20.0, 50.0, 30.0)).seconds == 2.0


@pytest.mark.parametrize(("rate", "is_held"), [(125.0, True), (124.0, False)])
def test_the_best_of_each_side_face_the_bar(rate: float, is_held: bool) -> None:
    key = ("fixed", "float32")
    verdicts = judge(
        {(*key, OURS): runs(50.0, rate), (*key, GENERATE): runs(100.0, 80.0), (*key, BATCHES): runs(500.0)}
    )
    assert [verdict.value for verdict in verdicts] == [pytest.approx(rate / 100)]
    assert [verdict.is_held for verdict in verdicts] == [is_held]


def test_the_bar_is_the_scenarios_own_and_dtypes_are_not_mixed() -> None:
    everything = {
        (name, dtype, side): runs(rate * (10 if dtype == "bfloat16" else 1))
        for dtype in ("float32", "bfloat16")
        for name in ("variable", "four")
        for side, rate in ((OURS, 190.0), (GENERATE, 100.0))
    }
    verdicts = judge(everything)
    assert [verdict.value for verdict in verdicts] == [pytest.approx(1.9)] * 4
    assert [(verdict.bar, verdict.is_held) for verdict in verdicts] == [(2.0, False), (1.25, True)] * 2


def test_upper_tails_are_those_of_the_tables() -> None:
    assert upper_tail(3.841, 1) == pytest.approx(0.05, abs=1e-4)
    assert upper_tail(18.307, 10) == pytest.approx(0.05, abs=1e-4)


def test_bins_hold_enough_and_every_outcome() -> None:
    expected = {(0,): 30.0, (1,): 4.0, (2,): 12.0, (3,): 5.0, (4,): 3.0, (5,): 1.0}
    assert pool(expected) == [[(0,)], [(2,)], [(3,), (1,), (4,), (5,)]]  # 5 + 4 + 3 = 12, and 1 is left over


def test_chi_square_of_two_samples_is_worked_by_hand() -> None:
    # N = M, so Σ (a − b)² / (a + b): 100/90 + 100/110 = 2.0202, and one degree of freedom
    found = two_samples("", Counter({(0,): 50, (1,): 50}), Counter({(0,): 40, (1,): 60}))
    assert (found.p, found.bins) == (pytest.approx(upper_tail(2.0202, 1), rel=1e-4), 2)
    # twice as many draws of the same shares agree wholly
    assert two_samples("", {(0,): 50, (1,): 30}, {(0,): 100, (1,): 60}).p == pytest.approx(1.0)


def test_chi_square_against_probabilities_is_worked_by_hand() -> None:
    # expected 25 and 75: 25/25 + 25/75 = 1.3333
    found = one_sample("", {(0,): 30, (1,): 70}, {(0,): 0.25, (1,): 0.75})
    assert found.p == pytest.approx(upper_tail(4 / 3, 1))
    assert one_sample("", {(0,): 100, (2,): 1}, {(0,): 0.25, (1,): 0.75}).p == 0.0


def test_exact_pairs_sum_to_one_and_hold_what_ends(theirs: PeftModel) -> None:
    exact = exact_pairs(theirs, (7, 8, 9), frozenset({4}))
    assert sum(exact.values()) == pytest.approx(1.0)
    assert [pair for pair in exact if pair[0] == 4] == [(4, ENDED)]
    logits = theirs(input_ids=torch.tensor([[7, 8, 9, 5]])).logits[0].softmax(-1)
    assert exact[5, 6] == pytest.approx((logits[2, 5] * logits[3, 6]).item(), rel=1e-5)


def test_a_side_that_leaves_the_adapter_out_is_seen(tmp_path: Path) -> None:
    _, theirs = load_tiny(tmp_path)
    right = exact_pairs(theirs, PROMPT, frozenset(EOS))
    with theirs.disable_adapter():
        wrong = exact_pairs(theirs, PROMPT, frozenset(EOS))
    outcomes = list(right)
    generator = torch.Generator().manual_seed(0)

    def draw(exact: dict[Outcome, float]) -> Counter[Outcome]:
        weights = torch.tensor([exact[outcome] for outcome in outcomes])
        return Counter(outcomes[i] for i in torch.multinomial(weights, 2000, True, generator=generator).tolist())

    assert one_sample("", draw(right), right).is_held
    assert two_samples("", draw(right), draw(right)).is_held
    assert not one_sample("", draw(wrong), right).is_held
    assert not two_samples("", draw(wrong), draw(right)).is_held


def test_both_sides_sample_the_same_distribution(tmp_path: Path) -> None:
    agreements = compare_distributions(tmp_path, samples=2000)
    assert [agreement for agreement in agreements if not agreement.is_held] == []
    assert min(agreement.bins for agreement in agreements) > 10


def test_theirs_is_pefts_and_transformers_own(ours: AdaptedModel, theirs: PeftModel) -> None:
    layers = [module for module in theirs.modules() if isinstance(module, PeftLinear)]
    assert len(layers) == 7 * SMALL.layers
    assert {type(layer) for layer in layers} == {PeftLinear}
    config = cast(PreTrainedModel, theirs.get_base_model()).config
    assert config._attn_implementation == "sdpa"  # pyright: ignore[reportPrivateUsage]
    assert type(next(m for m in ours.peft.modules() if isinstance(m, PeftLinear))) is not PeftLinear
    ids = torch.tensor([[7, 8, 9]])
    with ours.role("policy"):
        logits = ours.lm_head.logits(ours.hidden(ids))
    torch.testing.assert_close(logits, theirs(input_ids=ids).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("side", [OURS, GENERATE, BATCHES])
@pytest.mark.parametrize("name", list(SCENARIOS))
def test_every_side_answers_every_prompt_as_often_as_the_scenario_says(
    name: str, side: str, prepared: Path, ours: AdaptedModel, theirs: PeftModel
) -> None:
    scenario = SCENARIOS[name]
    prompts = read_prompts(prepared)
    work = make_work(replace(scenario, prompts=scenario.prompts // 4), prompts, SMALL.vocabulary)
    run = time_run(_sides(ours, theirs)[side], work)
    assert len(run.lengths) == scenario.prompts // 4 * scenario.per_prompt
    if name == "variable":
        assert len(set(run.lengths)) > 10
        assert sum(run.lengths) / len(run.lengths) == pytest.approx(scenario.mean_tokens, rel=0.5)
    else:
        assert set(run.lengths) == {scenario.max_tokens}


def test_missing_answers_and_wrong_lengths_are_refused() -> None:
    def cut(work: Work) -> Sequence[Sequence[int]]:
        return [[1, 2]] * len(work.prompts) * work.per_prompt

    with pytest.raises(RuntimeError, match="3 answers were to come"):
        time_run(lambda work: [[1], [2]], Work([(5,)], 3, 4, (9,), 0))
    with pytest.raises(RuntimeError, match="all were to be 64"):
        time_sides(dict.fromkeys((OURS, GENERATE, BATCHES), cut), [(5,)] * 256, 100)


def test_the_prompts_are_enough_and_of_the_tasks_length(prepared: Path) -> None:
    prompts = read_prompts(prepared)
    assert len(set(prompts)) >= max(scenario.prompts for scenario in SCENARIOS.values())
    assert {len(ids) for ids in prompts} == {5}
    assert Task().prompt_length == 48


def _sides(ours: AdaptedModel, theirs: PeftModel) -> dict[str, Sample]:
    return {
        OURS: lambda work: sample_ours(ours, work),
        GENERATE: lambda work: sample_theirs(theirs, work),
        BATCHES: lambda work: sample_in_batches(theirs, work),
    }
