from pathlib import Path
from typing import Any

import pytest
import torch

import align.rewards
from align.config import RewardsConfig
from align.episodes import Episode, collate, score_pass
from align.heads import ScalarHead, ScoreStatistics
from align.rewards import RewardModel, RewardSources, Source, combine, reward_sources
from align.sampler import text_of
from data.records import Message
from tests.align.classifiers import write_classifier
from tests.resident import drawn_episodes, resident, with_adapters

HERE = "tests.align.scoring_functions"
SCORES_KB = torch.tensor([[1.0, 4.0], [2.0, 4.0], [6.0, 4.0]])


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("mean", [3.0, 4.0]),
        ("min", [1.0, 4.0]),
        # deviations −2, −1, 3: std √(14/3)
        ("mean-std", [3.0 - 0.5 * (14 / 3) ** 0.5, 4.0]),
    ],
)
def test_an_ensembles_scores_are_combined(how: str, expected: list[float]) -> None:
    assert combine(SCORES_KB, how=how, penalty=0.5).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("how", ["mean", "min", "mean-std"])
def test_an_ensemble_of_equals_is_one_of_them(how: str) -> None:
    assert combine(SCORES_KB[:1].expand(4, 2), how=how, penalty=3.0).tolist() == [1.0, 4.0]


def test_sources_are_weighted_and_summed_as_they_are_or_standardised() -> None:
    model = Source("reward", 2.0, lambda b, e: torch.zeros(1), ScoreStatistics(1.0, 4.0, 9))
    other = Source("rule", -0.5, lambda b, e: torch.zeros(1))
    sources, scores = RewardSources((model, other)), {"reward": torch.tensor([9.0]), "rule": torch.tensor([3.0])}
    assert sources.total(scores).tolist() == [16.5]  # 2·9 − 0.5·3
    assert sources.standardized(scores).tolist() == [2.5]  # 2·(9 − 1)/4 − 0.5·3


def test_a_prompt_reads_as_its_words_or_as_turns_with_their_roles() -> None:
    system, user = Message("system", "be kind"), Message("user", "Why?")
    assert text_of((system, user)) == "Why?"
    assert text_of((user, Message("assistant", "So."), user)) == "user: Why?\nassistant: So.\nuser: Why?"


def test_every_kind_of_source_scores_the_same_episodes(tmp_path: Path) -> None:
    model = with_adapters("llama", "sft", "reward-1", "reward-2")
    codec = model.base.codec(None)
    episodes = [
        Episode(e.prompt_ids, tuple(codec.tokenizer("good day a")["input_ids"]), True, prompt_text="Hi")
        for e in drawn_episodes([(4, 3), (6, 2)], end=1)
    ]
    batch = collate(episodes, pad_id=codec.pad_id, device=model.device)
    members = tuple(
        RewardModel(f"reward-{n}", ScalarHead(model.hidden_size).initialize(n), ScoreStatistics(n, 2.0 * n, 4))
        for n in (1, 2)
    )
    config = RewardsConfig.model_validate(
        {
            "ensemble": "min",
            "sources": [
                {"kind": "reward"},
                {"kind": "classifier", "name": "mood", "model": str(write_classifier(tmp_path)), "label": "positive"},
                {"kind": "function", "function": f"{HERE}:share_of_a", "weight": 3},
            ],
        }
    )
    found = reward_sources(config, members, model, codec).score(batch, episodes)
    assert list(found) == ["reward", "mood", "function"]
    assert found["function"].tolist() == pytest.approx([0.2, 0.2])  # "good day a": two of ten
    assert found["mood"][0] == found["mood"][1]
    own = []
    for member in members:
        with torch.no_grad(), model.role(member.adapter):
            own.append((score_pass(model, member.head, batch) - member.scale.mean) / member.scale.std)
    torch.testing.assert_close(found["reward"], torch.minimum(*own))


@pytest.mark.parametrize(("normalize", "expected"), [("model", 3.0), ("none", 7.0), ("running", 7.0)])
def test_one_reward_model_is_standardised_by_its_own_scale_only_if_asked(normalize: str, expected: float) -> None:
    model = with_adapters("llama", "sft", "reward")
    member = RewardModel("reward", ScalarHead(model.hidden_size), ScoreStatistics(1.0, 2.0, 4))
    config = RewardsConfig.model_validate({"normalize": normalize})
    sources = reward_sources(config, (member,), model, model.base.codec(None))
    assert sources.standardized({"reward": torch.tensor([7.0])}).item() == expected


def test_a_classifier_is_the_revision_that_was_asked_for_and_reads_what_it_was_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[dict[str, Any]] = []

    class Noted:
        def __init__(self, model: str, **options: Any) -> None:
            seen.append({"model": model, **options})

    monkeypatch.setattr(align.rewards, "Classifier", Noted)
    own = {"kind": "classifier", "model": "a/b", "label": "good"}
    model = resident()
    for sees in ("response", "both"):
        config = RewardsConfig.model_validate({"sources": [{**own, "revision": "abc", "sees": sees}]})
        reward_sources(config, (), model, model.base.codec(None))
    assert [(one["model"], one["revision"], one["label"]) for one in seen] == [("a/b", "abc", "good")] * 2
    assert [one["sees_prompt"] for one in seen] == [False, True]
