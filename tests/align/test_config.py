"""What the PPO sections refuse, each with its reason."""

import pytest
from pydantic import ValidationError

from align.config import KLConfig, PPOConfig, RewardsConfig


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"kl": {"place": "loss", "estimator": "k1"}}, "k1 in the loss has an expected gradient of 0"),
        ({"kl": {"estimator": "k2"}}, "k2 in the reward has a gradient that is off by more than 100 %"),
        ({"kl": {"estimator": "k3"}}, "k3 in the reward"),
        ({"advantage": {"estimator": "rloo"}}, "rloo compares a prompt's responses"),
        ({"rollout": {"responses_per_prompt": 3}}, "episodes 64 is not a multiple of responses_per_prompt 3"),
        ({"rollout": {"min_response_length": 9, "max_response_length": 8}}, "min_response_length 9 is above"),
        ({"guard": {"patience": 2}}, "give every, too"),
        ({"guard": {"max_kl": 9.0}}, "give every, too"),
        ({"rewards": {"sources": []}}, "at least 1 item"),
        ({"rewards": {"sources": [{"kind": "function"}]}}, "of kind function needs function; given: none"),
        ({"rewards": {"sources": [{"kind": "classifier", "function": "a:b"}]}}, "needs model; given: function"),
        ({"rewards": {"sources": [{"kind": "reward", "model": "a/b"}]}}, "of kind reward takes no model"),
        ({"rewards": {"sources": [{"kind": "function", "function": "a:b", "sees": "both"}]}}, "takes no sees"),
        ({"rewards": {"sources": [{"kind": "classifier", "model": "a", "timeout_seconds": 3}]}}, "no timeout_seconds"),
        ({"rewards": {"sources": [{"kind": "function", "function": "nothing"}]}}, "should match pattern"),
        ({"rewards": {"sources": [{}, {}]}}, "need distinct names, these have reward, reward"),
        ({"rewards": {"sources": [{}, {"name": "other"}]}}, "only one reward source can be of kind reward"),
    ],
)
def test_what_does_not_fit_together_is_refused_with_the_reason(sections: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PPOConfig.model_validate(sections)


def test_the_estimator_follows_the_place_unless_it_is_named() -> None:
    assert KLConfig().used_estimator == "k1"
    assert KLConfig(place="loss").used_estimator == "k2"
    assert KLConfig(place="loss", estimator="k3").used_estimator == "k3"


def test_gae_is_whitened_and_group_advantages_are_not_unless_asked() -> None:
    for estimator, whiten, expected in (("gae", None, True), ("rloo", None, False), ("rloo", True, True)):
        config = PPOConfig.model_validate(
            {"advantage": {"estimator": estimator, "whiten": whiten}, "rollout": {"responses_per_prompt": 2}}
        )
        assert config.advantage.is_whitened == expected


def test_the_reward_stages_model_is_the_only_source_unless_others_are_named() -> None:
    assert [source.label_in_logs for source in RewardsConfig().sources] == ["reward"]
    assert RewardsConfig().uses_reward_model
    only = RewardsConfig.model_validate({"sources": [{"kind": "function", "function": "a.b:c", "name": "rule"}]})
    assert not only.uses_reward_model
