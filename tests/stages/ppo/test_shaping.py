from dataclasses import replace

import pytest
import torch

from align.rewards import RewardSources, Source
from stages.ppo.learn import estimate
from stages.ppo.metrics import describe
from stages.ppo.shaping import Shaper
from tests.stages.ppo.test_train import rollout_by_hand, shaped_by_hand
from tests.stages.scenes import ppo_config


def test_a_response_of_the_full_length_costs_the_whole_length_penalty() -> None:
    # 2 of 4 tokens cost half of 3.0, 1 of 4 a quarter: 1.5 − 1.5; −1.5 − 0.75
    config = ppo_config(rewards={"length_penalty": 3.0, "missing_eos_penalty": 0.0})
    assert shaped_by_hand(config)[0].scores[0].tolist() == [0.0, -2.25]


def test_a_kl_term_in_the_loss_is_not_in_the_rewards_too() -> None:
    config = ppo_config(kl={"coefficient": 0.1, "place": "loss"}, rewards={"missing_eos_penalty": 0.0})
    assert shaped_by_hand(config)[0].rewards[0].tolist() == [[0.0, 1.5], [-1.5, 0.0]]


def test_whitened_rewards_keep_their_mean() -> None:
    rewards = {"missing_eos_penalty": 0.0}
    plain, whitened = (
        shaped_by_hand(ppo_config(rewards={**rewards, "whiten": on}))[0].rewards[0][[0, 0, 1], [0, 1, 0]]
        for on in (False, True)
    )
    assert whitened.var(unbiased=False).item() == pytest.approx(1)
    assert plain.var(unbiased=False).item() != pytest.approx(1)
    assert whitened.mean().item() == pytest.approx(plain.mean().item(), abs=1e-6)


def test_each_of_several_sources_has_its_own_score_in_the_metrics() -> None:
    config, zero = ppo_config(), lambda batch, episodes: torch.zeros(2)
    sources = RewardSources((Source("reward", 2.0, zero), Source("rule", -0.5, zero)))
    [mb] = rollout_by_hand().micro_batches
    mb = replace(mb, scores={"reward": torch.tensor([4.0, -2.0]), "rule": torch.tensor([3.0, 1.0])})
    rollout = replace(rollout_by_hand(), micro_batches=(mb,))
    shaped = Shaper(config.rewards, config.kl, sources, max_response_length=4).shape(rollout)
    experience = estimate(rollout, shaped.rewards, config.advantage)
    found = describe(rollout, shaped, experience, sources, has_critic=True)
    # 2 · 1 − ½ · 2
    assert (found["objective/score_reward"], found["objective/score_rule"], found["objective/score"]) == (1, 2, 1)
