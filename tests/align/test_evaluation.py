from dataclasses import replace

import pytest

from align.evaluation.gold import NLL_BAND, base_nll, gold_score, repetition
from align.evaluation.run import Answers, compare, distinct_2
from tests.resident import logits_of, with_adapters

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
    assert found["win_rate_judge"] == "reward model"
    assert not any(name.startswith("gold") for name in found)


def test_a_side_against_itself_wins_half_and_gains_nothing() -> None:
    found = compare(SFT, SFT, samples=2, seed=0)
    assert (found["win_rate"], found["gold_gain"], found["nll_ratio"], found["distinct2_ratio"]) == (0.5, 0, 1, 1)


def test_distinct_2_is_the_share_of_different_word_pairs() -> None:
    assert distinct_2(["a b a b", "a b"]) == 0.5  # ab ba ab ab: 2 of 4
    assert distinct_2(["a b c d"]) == 1
    assert distinct_2(["a", ""]) == 0


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
