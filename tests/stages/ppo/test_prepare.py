from dataclasses import replace
from pathlib import Path

import pytest
import torch

from align.heads import load_head
from stages.ppo.prepare import prepare
from tests.resident import resident
from tests.stages.ppo.test_actor_critic import value_head_of
from tests.stages.ppo.test_guard import WATCHED, inputs_of
from tests.stages.scenes import context_of, ppo_config, ppo_inputs, prompts


@pytest.mark.parametrize(("normalize", "mean", "std"), [("model", 0.5, 2.0), ("none", 0.0, 1.0)])
def test_an_adapter_critic_starts_at_what_its_source_adds_to_the_reward(
    normalize: str, mean: float, std: float, tmp_path: Path
) -> None:
    rewards = {"sources": [{"kind": "reward", "weight": 4.0}], "normalize": normalize}
    inputs, context = ppo_inputs(tmp_path), context_of(resident(), tmp_path, "ppo")
    parts = prepare(ppo_config(critic={"kind": "adapter"}, rewards=rewards), inputs, context)
    head, _ = load_head(inputs.reward_models[0].head.path, device=context.model.device)
    hidden = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(value_head_of(parts.actor_critic)(hidden), 4 * (head(hidden) - mean) / std)


def test_an_adapter_critic_of_an_ensemble_starts_at_its_first_member_standardised(tmp_path: Path) -> None:
    inputs, context = ppo_inputs(tmp_path), context_of(resident(), tmp_path, "ppo")
    inputs = replace(inputs, reward_models=inputs.reward_models * 2)
    parts = prepare(ppo_config(critic={"kind": "adapter"}, rewards={"normalize": "none"}), inputs, context)
    head, scale = load_head(inputs.reward_models[0].head.path, device=context.model.device)
    assert scale is not None
    hidden = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(value_head_of(parts.actor_critic)(hidden), (head(hidden) - scale.mean) / scale.std)


def test_the_guard_looks_at_the_last_of_the_held_out_prompts(tmp_path: Path) -> None:
    parts = prepare(ppo_config(guard=WATCHED), inputs_of(tmp_path), context_of(resident(), tmp_path, "ppo"))
    assert [prompt.messages for prompt in parts.guard.held_out.prompts] == [p.messages for p in prompts(6)[-4:]]


@pytest.mark.parametrize("setting", [{}, {"top_k": 5}, {"top_p": 0.9}, {"min_response_length": 2}])
def test_samples_that_leave_the_distribution_are_warned_of(
    setting: dict[str, float], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prepare(ppo_config(rollout=setting), ppo_inputs(tmp_path), context_of(resident(), tmp_path, "ppo"))
    told = [r.getMessage() for r in caplog.records if "samples leave the distribution" in r.getMessage()]
    assert len(told) == len(setting)
    assert all(name in told[0] for name in setting)
