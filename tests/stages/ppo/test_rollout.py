from collections import Counter
from dataclasses import replace

import pytest
import torch

from align.adapters import RAW_BASE, AdaptedModel
from align.episodes import Episode, collate, policy_pass, score_pass, value_pass
from align.heads import ScalarHead
from align.randomness import drawn_indices
from align.sampler import Sampler
from data.tokenization import TokenizedPrompt
from stages.ppo.rollout import Critic, Rollout, score
from tests.resident import SHAPES, randomize, with_adapters
from tests.stages.scenes import SAMPLING, ppo_config, reward_model_of, sources_of, tokenized

PROMPTS = tokenized(*(tuple(range(30 + n, 32 + 2 * n)) for n in range(4)))


def episodes_of(model: AdaptedModel, prompts: list[TokenizedPrompt], *, turn: int = 0, each: int = 1) -> list[Episode]:
    sampler = Sampler(model, model.base.codec(None), SAMPLING, seed=0)
    return sampler.episodes(prompts, role="policy", purpose="sample", turn=turn, each=each)


def rolled_out(model: AdaptedModel, *, size: int = 2, critic_is_adapter: bool = False) -> tuple[list[Episode], Rollout]:
    episodes = episodes_of(model, PROMPTS)
    return episodes, looked_at(model, episodes, size=size, critic_is_adapter=critic_is_adapter)


def looked_at(
    model: AdaptedModel, episodes: list[Episode], *, size: int = 2, critic_is_adapter: bool = False
) -> Rollout:
    sources = sources_of(ppo_config(), model, reward_model_of(model))
    critic = Critic(ScalarHead(model.hidden_size).initialize(2), critic_is_adapter)
    pad_id = model.base.codec(None).pad_id
    return score(model, episodes, sources, critic, micro_batch_size=size, temperature=1.0, pad_id=pad_id)


def test_every_prompt_is_answered_once_in_each_epoch_over_the_prompts() -> None:
    # 3 updates of 8 episodes through 6 prompts: four whole epochs
    indices = [i for update in range(3) for i in drawn_indices(0, "prompts", update, num_drawn=8, size=6)]
    for epoch in range(4):
        assert sorted(indices[6 * epoch : 6 * epoch + 6]) == list(range(6))
    assert len({tuple(indices[6 * epoch : 6 * epoch + 6]) for epoch in range(4)}) == 4  # each time in another order


def test_which_prompts_an_update_answers_does_not_depend_on_the_updates_before() -> None:
    later = drawn_indices(0, "prompts", 7, num_drawn=8, size=100)
    assert later == drawn_indices(0, "prompts", 7, num_drawn=8, size=100)
    assert later != drawn_indices(1, "prompts", 7, num_drawn=8, size=100)
    assert later == [i for half in (14, 15) for i in drawn_indices(0, "prompts", half, num_drawn=4, size=100)]


def test_more_episodes_than_prompts_answer_each_several_times_with_other_words() -> None:
    assert Counter(drawn_indices(0, "prompts", 0, num_drawn=9, size=3)) == {0: 3, 1: 3, 2: 3}
    model = with_adapters("llama", "sft", "policy")
    same = [PROMPTS[0]] * 4
    episodes = episodes_of(model, same)
    assert len({episode.response_ids for episode in episodes}) == 4
    again = episodes_of(model, same, turn=1)
    assert not {e.response_ids for e in episodes} & {e.response_ids for e in again}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_reference_is_the_frozen_sft_adapter_and_not_the_raw_base(shape: str) -> None:
    model = with_adapters(shape, "sft", "reward")
    model.add("policy", copy_of="sft")
    _, rollout = rolled_out(model)
    for mb in rollout.micro_batches:
        # A policy that is a copy of sft has no divergence from the reference. From the raw base it has.
        assert torch.equal(mb.logprobs_BT, mb.ref_logprobs_BT)
        with torch.no_grad(), model.role(RAW_BASE):
            raw_BT = policy_pass(model, mb.batch).logprobs_BT
        assert (raw_BT - mb.ref_logprobs_BT).abs().max() > 1e-3
    randomize(model, "policy", seed=9)
    _, rollout = rolled_out(model)
    with torch.no_grad(), model.role("sft"):
        for mb in rollout.micro_batches:
            assert torch.equal(policy_pass(model, mb.batch).logprobs_BT, mb.ref_logprobs_BT)
            assert not torch.equal(mb.logprobs_BT, mb.ref_logprobs_BT)


def test_each_role_looks_with_its_own_adapter_and_head() -> None:
    model = with_adapters("llama", "sft", "policy", "reward", "value")
    reward_head, value_head = (ScalarHead(model.hidden_size).initialize(seed) for seed in (1, 2))
    for critic_is_adapter in (False, True):
        _, rollout = rolled_out(model, critic_is_adapter=critic_is_adapter)
        for mb in rollout.micro_batches:
            with torch.no_grad():
                with model.role("reward"):
                    torch.testing.assert_close(mb.scores["reward"], score_pass(model, reward_head, mb.batch))
                with model.role("value" if critic_is_adapter else "policy"):
                    torch.testing.assert_close(mb.values_BT, value_pass(model, value_head, mb.batch))
    model.verify_trainable()


def test_micro_batches_are_sorted_by_length_and_hold_every_episode_once() -> None:
    model = with_adapters("llama", "sft", "policy", "reward")
    episodes, rollout = rolled_out(model)
    pad_id = model.base.codec(None).pad_id
    lengths = [int(n) for mb in rollout.micro_batches for n in mb.batch.is_token_BS.sum(-1)]
    assert lengths == sorted(lengths)
    rows = [ids for mb in rollout.micro_batches for ids in mb.batch.ids_BS.tolist()]
    expected = collate(episodes, pad_id=pad_id, device=model.device).ids_BS
    assert sorted(tuple(i for i in row if i != pad_id) for row in rows) == sorted(
        tuple(i for i in row if i != pad_id) for row in expected.tolist()
    )
    flags = {tuple(e.prompt_ids): e.has_eos for e in episodes}
    for mb in rollout.micro_batches:
        for ids, start, has_eos in zip(
            mb.batch.ids_BS.tolist(), mb.batch.prompt_length_B.tolist(), mb.has_eos_B.tolist(), strict=True
        ):
            assert flags[tuple(ids[:start])] == has_eos


def test_the_gap_between_sampler_and_trainer_is_measured() -> None:
    model = with_adapters("llama", "sft", "policy", "reward")
    _, rollout = rolled_out(model)
    assert 0 <= rollout.sampler_gap_mean <= rollout.sampler_gap_max < 1e-4
    episodes = episodes_of(model, PROMPTS)
    off = episodes[2].sampler_logprobs
    episodes[2] = replace(episodes[2], sampler_logprobs=(off[0] + 0.5, *off[1:]))
    found = looked_at(model, episodes)
    assert found.sampler_gap_max == pytest.approx(0.5, abs=1e-4)
    assert found.sampler_gap_mean == pytest.approx(0.5 / sum(len(e.response_ids) for e in episodes), abs=1e-4)


def test_several_responses_to_a_prompt_stand_in_one_group() -> None:
    model = with_adapters("llama", "sft", "policy", "reward")
    episodes = episodes_of(model, PROMPTS[:2], each=3)
    assert [(e.group, e.prompt_ids, e.prompt_text) for e in episodes] == [
        (group, PROMPTS[group].ids, f"prompt {group}") for group in (0, 0, 0, 1, 1, 1)
    ]
    assert len({e.response_ids for e in episodes[:3]}) == 3
    rollout = looked_at(model, episodes)
    groups = {tuple(e.response_ids): e.group for e in episodes}
    for mb in rollout.micro_batches:
        starts, ends = mb.batch.prompt_length_B.tolist(), mb.batch.response_length_B.tolist()
        rows = zip(mb.batch.ids_BS.tolist(), starts, ends, mb.group_B.tolist(), strict=True)
        assert all(groups[tuple(ids[start : start + length])] == group for ids, start, length, group in rows)


def test_whether_a_response_ended_stays_with_it_when_rows_are_sorted_by_length() -> None:
    model = with_adapters("llama", "sft", "policy", "reward")
    episodes = episodes_of(model, PROMPTS[::-1])  # the longest first
    episodes = [replace(episode, has_eos=n < 2) for n, episode in enumerate(episodes)]
    ended = {episode.prompt_ids: episode.has_eos for episode in episodes}
    for mb in looked_at(model, episodes).micro_batches:
        rows = zip(mb.batch.ids_BS.tolist(), mb.batch.prompt_length_B.tolist(), mb.has_eos_B.tolist(), strict=True)
        assert all(ended[tuple(ids[:start])] == has_eos for ids, start, has_eos in rows)
