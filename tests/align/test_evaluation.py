from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from align.config import EvaluationConfig, RewardsConfig
from align.context import EvaluationInputs
from align.episodes import Episode, collate, policy_pass, score_pass
from align.errors import StoppedError
from align.evaluation.gold import NLL_BAND, base_nll, gold_score, repetition
from align.evaluation.run import Answers, compare, distinct_2, run_evaluation
from align.generation import generate
from align.heads import load_head
from align.randomness import keyed_uniforms
from align.stopping import ask_to_stop
from data.tokenization import encode_prompt
from tests.resident import logits_of, resident, with_adapters
from tests.stages.scenes import SAMPLING, context_of, ppo_inputs

# Two prompts of two answers each.
SFT = Answers(
    texts=["a b c", "a b d", "e f", "g"],
    scores=[0.0, 1.0, 2.0, 3.0],
    nlls=[2.0, 2.0, 4.0, 1.0],
    golds=[0.1, 0.2, 0.3, 0.4],
    kls=[0.0, 0.0, 0.0, 0.0],
    lengths=[3.0, 3.0, 2.0, 1.0],
    ended=[1.0, 0.0, 1.0, 0.0],
)
PPO = Answers(
    texts=["a b a b", "x y", "e f", "g h"],
    scores=[1.0, 1.0, 1.0, 5.0],
    nlls=[1.0, 3.0, 2.0, 2.0],
    golds=[0.5, 0.2, 0.1, 0.8],
    kls=[1.0, 2.0, 3.0, 6.0],
    lengths=[4.0, 2.0, 2.0, 2.0],
    ended=[1.0, 1.0, 1.0, 0.0],
)


def test_the_comparison_of_four_answers_by_hand() -> None:
    found = compare(SFT, PPO, samples=2, seed=0)
    expected = {
        "score_sft": 1.5,
        "score_ppo": 2.0,
        "score_gain": 0.5,
        "gold_sft": 0.25,
        "gold_ppo": 0.4,
        "gold_gain": 0.15,
        "win_rate": 0.625,  # by gold: won, tied, lost, won
        "kl": 3.0,
        "length_sft": 2.25,
        "length_ppo": 2.5,
        "eos_rate_sft": 0.5,
        "eos_rate": 0.75,
        # nats per token over all: (4 + 6 + 4 + 4)/10 = 1.8 to (6 + 6 + 8 + 1)/9 = 21/9
        "nll_ratio": 1.8 * 9 / 21,
        # word pairs: PPO ab ba ab · xy · ef · gh: 5 of 6; SFT ab bc · ab bd · ef: 4 of 5
        "distinct2_ratio": (5 / 6) / (4 / 5),
        "num_answers": 4,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert found["win_rate_judge"] == "gold"


def test_intervals_are_over_prompts_not_over_answers() -> None:
    # The two prompts' mean gains in gold are 0.2 and 0.1: with two clusters the interval is both
    found = compare(SFT, PPO, samples=2, seed=0)
    assert found["gold_gain_ci95"] == pytest.approx([0.1, 0.2])
    assert found["kl_ci95"] == pytest.approx([1.5, 4.5])


def test_without_gold_the_reward_model_judges_and_says_so() -> None:
    found = compare(replace(SFT, golds=[]), replace(PPO, golds=[]), samples=2, seed=0)
    assert found["win_rate"] == pytest.approx(0.625)  # by score: won, tied, lost, won
    assert found["win_rate_judge"] == "reward"
    assert not any(name.startswith("gold") for name in found)


def test_a_ratio_to_nothing_is_none() -> None:
    found = compare(replace(SFT, texts=["a", "b", "c", "d"], nlls=[0.0] * 4), PPO, samples=2, seed=0)
    assert (found["distinct2_ratio"], found["nll_ratio"]) == (None, None)


def test_a_side_against_itself_wins_half_and_gains_nothing() -> None:
    found = compare(SFT, SFT, samples=2, seed=0)
    assert (found["win_rate"], found["gold_gain"], found["nll_ratio"], found["distinct2_ratio"]) == (0.5, 0, 1, 1)


def test_distinct_2_is_the_share_of_different_word_pairs() -> None:
    assert distinct_2(["a b a b", "a b"]) == 0.5  # ab ba ab ab: 2 of 4
    assert distinct_2(["a b c d"]) == 1
    assert distinct_2(["a", ""]) == 0


def evaluated(root: Path, policy: str) -> Mapping[str, object]:
    """Evaluation of SFT against a policy that is the sft adapter itself, or the reward adapter."""
    made = ppo_inputs(root)
    assert made.sft is not None
    adapter = {"sft": made.sft, "reward": made.reward_models[0].adapter}[policy]
    inputs = EvaluationInputs(made.sft, adapter, made.reward_models, RewardsConfig(), made.prompts, SAMPLING)
    config = EvaluationConfig(prompts=4, samples=3, gold="sentiment", show=2)
    return run_evaluation(config, inputs, context_of(resident(), root, "evaluation")).metrics


def test_it_ends_when_it_is_asked_to_stop(tmp_path: Path) -> None:
    ask_to_stop(tmp_path)
    with pytest.raises(StoppedError):
        evaluated(tmp_path, "sft")


def test_a_policy_that_is_sft_answers_the_same_and_gains_nothing(tmp_path: Path) -> None:
    found = evaluated(tmp_path, "sft")
    expected = {"kl": 0.0, "gold_gain": 0.0, "score_gain": 0.0, "win_rate": 0.5, "nll_ratio": 1.0, "num_answers": 12}
    assert {name: found[name] for name in expected} == expected
    samples = cast("list[dict[str, str]]", found["samples"])
    assert [sample["prompt"] for sample in samples] == ["say ", "say a"]
    assert all(sample["sft"] == sample["ppo"] for sample in samples)


def test_an_evaluation_by_a_plain_loop(tmp_path: Path) -> None:
    found = evaluated(tmp_path, "reward")
    made = ppo_inputs(tmp_path / "again")
    model = with_adapters("llama", "sft", "reward")  # the adapters that the artifacts were made of
    codec, head = model.base.codec(None), load_head(made.reward_models[0].head.path, device=model.device)[0]
    prompts = [tuple(encode_prompt(codec, prompt.messages)) for prompt in made.prompts[:4] for _ in range(3)]
    seed = context_of(model, tmp_path / "again", "evaluation").seed
    uniforms = keyed_uniforms(seed, "evaluation", 0, list(range(12)), SAMPLING.max_response_length)
    kls: list[float] = []
    scores: list[float] = []
    for row, prompt in enumerate(prompts):
        with model.role("reward"):
            [answer] = generate(model, codec, [prompt], sampling=SAMPLING, uniforms_BT=uniforms[row : row + 1])
        batch = collate([Episode(prompt, answer.ids, answer.has_eos)], pad_id=codec.pad_id, device=model.device)
        with torch.no_grad():
            with model.role("sft"):
                reference = policy_pass(model, batch).logprobs_BT.sum().item()
            with model.role("reward"):
                kls.append(policy_pass(model, batch).logprobs_BT.sum().item() - reference)
                scores.append(score_pass(model, head, batch).item())
    assert found["kl"] == pytest.approx(sum(kls) / 12, abs=1e-4)
    assert found["score_ppo"] == pytest.approx(sum(scores) / 12, abs=1e-4)
    assert abs(sum(kls)) > 1e-2


def test_fewer_prompts_than_are_to_be_shown_are_all_shown_and_only_those_asked_are_counted(tmp_path: Path) -> None:
    made = ppo_inputs(tmp_path)
    assert made.sft is not None
    inputs = EvaluationInputs(made.sft, made.sft, made.reward_models, RewardsConfig(), made.prompts, SAMPLING)
    config = EvaluationConfig(prompts=2, samples=1, show=9)
    assert len(made.prompts) > 2
    found = run_evaluation(config, inputs, context_of(resident(), tmp_path, "evaluation"))
    assert len(cast("list[object]", found.metrics["samples"])) == 2
    assert found.account is not None
    assert (found.account.rows_in, found.account.kept) == (2, 2)


def test_answers_are_judged_at_the_temperature_that_they_were_drawn_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []

    def watched(*arguments: Any, temperature: float, **more: Any) -> Any:
        seen.append(temperature)
        return policy_pass(*arguments, temperature=temperature, **more)

    monkeypatch.setattr("align.rewards.policy_pass", watched)
    made = ppo_inputs(tmp_path)
    assert made.sft is not None
    sampling = replace(SAMPLING, temperature=0.5)
    inputs = EvaluationInputs(made.sft, made.sft, made.reward_models, RewardsConfig(), made.prompts, sampling)
    run_evaluation(EvaluationConfig(prompts=2, samples=1), inputs, context_of(resident(), tmp_path, "evaluation"))
    assert set(seen) == {0.5}


# ---- gold ----


def test_repetition_counts_longer_words_said_again_case_and_punctuation_aside() -> None:
    assert repetition("Great, great GREAT day!") == pytest.approx(2 / 3)  # great ×3; "day" is short
    assert repetition("Every word here differs.") == 0
    assert repetition("is is is it it") == 0
    assert repetition("") == 0


def test_gold_is_vader_less_the_penalties() -> None:
    # VADER: "good" is 1.9, compound 1.9/√(1.9² + 15) = 0.4404
    assert gold_score("It was good.", 0.0) == pytest.approx(0.4404)
    assert gold_score("It was good.", NLL_BAND) == pytest.approx(0.4404)  # inside the band nothing is taken
    assert gold_score("It was good.", NLL_BAND + 2) == pytest.approx(0.4404 - 1.0)
    # "good good": 3.8/√(3.8² + 15) = 0.7003, less half: one of two words was said before
    assert gold_score("good good", 0.0) == pytest.approx(0.7003 - 0.5)
    assert gold_score("", 0.0) == 0


def test_a_sane_sentence_beats_stuffing_and_an_unhappy_one() -> None:
    sane = gold_score("I think rainy mornings are lovely and calm.", 2.5)
    assert sane > gold_score("great great great great", 6.0)
    assert sane > gold_score("great great great great", 2.5)
    assert sane > gold_score("I think rainy mornings are horrible.", 2.5)


def test_base_nll_is_of_the_raw_base_and_leaves_the_end_token_out() -> None:
    model = with_adapters("llama", "sft")
    codec = model.base.codec(None)
    end = codec.eos_ids[0]
    prompts: list[tuple[int, ...]] = [(5, 6, 7), (1,), (9, 9)]
    responses: list[tuple[int, ...]] = [(10, 11, end), (20, 21, 22, 23), (end,)]
    with model.role("sft"):  # whatever the present role
        found = base_nll(model, codec, prompts, responses)
    expected: list[float] = []
    for prompt, bare in zip(prompts, [(10, 11), (20, 21, 22, 23)], strict=False):
        logprobs_SV = logits_of(model, prompt + bare).log_softmax(-1)
        picked = [logprobs_SV[len(prompt) + t - 1, token].item() for t, token in enumerate(bare)]
        expected.append(-sum(picked) / len(picked))
    assert found == pytest.approx([*expected, 0.0], abs=1e-5)
