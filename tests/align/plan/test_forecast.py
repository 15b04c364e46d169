from dataclasses import replace
from typing import Any

import pytest

from align.config import Config
from align.plan import flops, memory
from align.plan.flops import Rows
from align.plan.forecast import Phase, forecast
from tests.align.plan.shapes import SMALL

ADAPTER, HEAD, BASE = 512 * 4, (8 + 1) * 4, 1448 * 2  # rank 2, bfloat16 base


def config(*, stages: tuple[str, ...] = ("sft", "reward", "ppo"), **sections: Any) -> Config:
    data = {stage: {"train": "rows.jsonl"} for stage in stages}
    sections.setdefault("ppo", {})
    rollout = {"episodes": 16, "max_prompt_length": 6, "max_response_length": 4, "batch_size": 8}
    loss = {"epochs": 3, "minibatches": 2, "micro_batch_size": 2}
    ppo = {"rollout": rollout, "loss": loss, **sections.pop("ppo")}
    return Config.model_validate(
        {
            "run": {"name": "plan", "stages": stages},
            "base": {"model": "owner/name", "dtype": "bfloat16"},
            "adapters": {"rank": 2},
            "data": data,
            "ppo": ppo,
            **sections,
        }
    )


def phase(of: Config, stage: str, name: str, **options: Any) -> Phase:
    plan = forecast(of, SMALL, on_gpu=True, **options)
    return next(each for each in plan.phases if (each.stage, each.name) == (stage, name))


def test_model_state_is_counted_to_the_byte() -> None:
    learn = phase(config(), "ppo", "learn").bytes
    assert learn.weights == BASE
    assert learn.adapters == 3 * ADAPTER + 2 * HEAD  # sft, reward and its head, policy and the critic's head
    assert learn.gradients == ADAPTER + HEAD
    assert learn.optimizer == 2 * (ADAPTER + HEAD)


def test_a_critic_on_an_adapter_of_its_own_is_trained_too() -> None:
    learn = phase(config(ppo={"critic": {"kind": "adapter"}}), "ppo", "learn").bytes
    assert learn.adapters == 4 * ADAPTER + 2 * HEAD
    assert learn.optimizer == 2 * (2 * ADAPTER + HEAD)


def test_without_a_critic_there_is_no_value_head() -> None:
    rollout = {"episodes": 16, "responses_per_prompt": 2}
    loss = {"minibatches": 2, "micro_batch_size": 2}
    of = config(ppo={"advantage": {"estimator": "rloo"}, "rollout": rollout, "loss": loss})
    assert phase(of, "ppo", "learn").bytes.gradients == ADAPTER


def test_every_member_of_an_ensemble_is_there_in_its_stage_and_in_ppo() -> None:
    of = config(reward={"ensemble": 3})
    assert phase(of, "ppo", "generate").bytes.adapters == (2 + 3) * ADAPTER + (3 + 1) * HEAD
    training = phase(of, "reward", "train").bytes
    assert training.adapters == ADAPTER + 3 * (ADAPTER + HEAD)
    assert training.gradients == ADAPTER + HEAD  # one member at a time


def test_roles_add_up_to_what_is_resident() -> None:
    plan = forecast(config(), SMALL, on_gpu=True)
    learn = next(each.bytes for each in plan.phases if each.name == "learn")
    assert plan.resident == learn.weights + learn.adapters
    assert sum(role.training for role in plan.roles) == learn.gradients + learn.optimizer
    assert [role.name.split(":")[0].split(",")[0] for role in plan.roles] == [
        "base", "reference", "policy", "reward", "value",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("stages", "names"),
    [(("sft",), ["base", "sft"]), (("sft", "reward"), ["base", "reference", "reward 1", "reward 2"])],
)
def test_without_ppo_the_roles_are_those_of_the_last_stage(stages: tuple[str, ...], names: list[str]) -> None:
    plan = forecast(config(stages=stages, reward={"ensemble": 2}), SMALL, on_gpu=True)
    last = next(each.bytes for each in reversed(plan.phases) if each.name == "train")
    assert [role.name.split(":")[0].split(",")[0] for role in plan.roles] == names
    assert plan.resident == last.weights + last.adapters
    assert sum(role.training for role in plan.roles) == last.gradients + last.optimizer


def test_the_cache_is_of_the_slots_and_twice_the_responses_if_slots_are_refilled() -> None:
    refilled = memory.cache_bytes(SMALL, slots=8, columns=1 + 6 + 2 * 4, dtype_bytes=2)
    assert phase(config(), "ppo", "generate").bytes.cache == refilled
    at_once = memory.cache_bytes(SMALL, slots=4, columns=1 + 6 + 4, dtype_bytes=2)
    assert phase(config(), "ppo", "generate", gpus=4).bytes.cache == at_once


def test_work_follows_the_phases_of_an_update() -> None:
    rows = Rows(16, 10)
    once, back = flops.forward(SMALL, rows, rank=2), flops.backward(SMALL, rows, rank=2)
    head = flops.lm_head(SMALL, 16 * 4)
    assert phase(config(), "ppo", "score").flops == 3 * once + 2 * head  # policy, reference, reward
    assert phase(config(), "ppo", "learn").flops == 3 * (once + back + 2 * head)
    critic = config(ppo={"critic": {"kind": "adapter"}})
    assert phase(critic, "ppo", "learn").flops == 3 * (2 * (once + back) + 2 * head)
    prefill = flops.forward(SMALL, Rows(16, 6), rank=2)
    decoded = flops.decode(SMALL, rank=2, sequences=16, prompt=6, response=4)
    assert phase(config(), "ppo", "generate").flops == prefill + decoded + head


def test_devices_share_rows_and_not_the_base() -> None:
    alone, shared = phase(config(), "ppo", "learn"), phase(config(), "ppo", "learn", gpus=4)
    assert shared.bytes == alone.bytes
    assert shared.flops == alone.flops / 4


def test_pairs_are_two_sequences_and_checkpointing_keeps_less_and_computes_more() -> None:
    pairs, verdicts = config(), config(reward={"objective": {"kind": "unpaired"}})
    assert phase(pairs, "reward", "train").flops == 2 * phase(verdicts, "reward", "train").flops
    checkpointed = config(reward={"gradient_checkpointing": True})
    before, after = phase(pairs, "reward", "train"), phase(checkpointed, "reward", "train")
    assert after.bytes.activations < before.bytes.activations
    assert after.flops > before.flops


def test_long_texts_beside_ppo_count_where_they_are_longer_than_episodes() -> None:
    of = config()
    loss = of.ppo.loss.model_copy(update={"ptx_coefficient": 1.0, "ptx_max_length": 100})
    with_texts = of.model_copy(update={"ppo": of.ppo.model_copy(update={"loss": loss})})
    assert phase(with_texts, "ppo", "learn").bytes.activations == 10 * phase(of, "ppo", "learn").bytes.activations


def test_on_a_cpu_loading_holds_the_files_too_if_their_dtype_is_another() -> None:
    plan = forecast(config(base={"model": "owner/name", "dtype": "float32"}), SMALL, on_gpu=False)
    assert plan.phases[0].stage == "load"
    assert plan.phases[0].bytes.weights == 1448 * (4 + 2)
    same = forecast(config(), SMALL, on_gpu=False)
    assert same.phases[0].bytes.weights == BASE
    assert same.peak("evaluation") >= same.phases[0].bytes.total


@pytest.mark.parametrize(
    ("stage", "phases"), [("sft", ["sft"]), ("reward", ["reward"]), ("ppo", ["ppo", "evaluation"])]
)
def test_a_stage_that_does_not_run_has_no_phase(stage: str, phases: list[str]) -> None:
    plan = forecast(config(stages=(stage,), reward={"adapter": "adapter"}), SMALL, on_gpu=True)
    assert list(dict.fromkeys(each.stage for each in plan.phases)) == phases


def test_kernels_of_a_cpu_keep_less_where_layers_are_plain() -> None:
    compiled = {"model": "owner/name", "dtype": "bfloat16", "compile": True}

    def activations(stage: str, *, has_kernels: bool, on_gpu: bool = False, **sections: Any) -> int:
        shape = replace(SMALL, has_kernels=has_kernels)
        phases = forecast(config(**sections), shape, on_gpu=on_gpu).phases
        name = "learn" if stage == "ppo" else "train"
        return next(each for each in phases if (each.stage, each.name) == (stage, name)).bytes.activations

    without = activations("ppo", has_kernels=False)
    norms, gates = 2 * SMALL.hidden_size * (4 - 2), SMALL.mlp_width * 2
    assert activations("ppo", has_kernels=True) == without - 2 * (6 + 4) * SMALL.num_layers * (norms + gates)
    assert activations("ppo", has_kernels=True, base=compiled) == without
    assert activations("ppo", has_kernels=True, on_gpu=True) == without
    trained = activations("reward", has_kernels=False)
    assert activations("reward", has_kernels=True, base=compiled) < trained  # trainers see plain layers


def test_on_a_cpu_the_heaps_holes_count_beside_the_activations() -> None:
    host = {phase.name: phase.bytes for phase in forecast(config(), SMALL, on_gpu=False).phases}["learn"]
    device = {phase.name: phase.bytes for phase in forecast(config(), SMALL, on_gpu=True).phases}["learn"]
    assert device.host == 0
    assert host.activations == device.activations > 0
    assert host.host == memory.PROCESS_BYTES + int(memory.HEAP_HOLES * host.activations)


def test_episodes_that_devices_cannot_share_evenly_are_rounded_up() -> None:
    alone, shared = phase(config(), "ppo", "learn"), phase(config(), "ppo", "learn", gpus=3)
    assert 16 * shared.flops == 6 * alone.flops  # 16 episodes on 3 devices: 6 on the fullest


def test_the_evaluation_has_no_critic_and_looks_at_whole_batches_of_answers() -> None:
    bytes_ = phase(config(), "evaluation", "").bytes
    assert bytes_.adapters == 3 * ADAPTER + HEAD  # sft, policy, reward and its head
    assert bytes_.optimizer == 0
    assert bytes_.activations == memory.forward_activations(SMALL, 8 * (6 + 4), dtype_bytes=2)


def test_a_value_adapter_looks_at_the_rollout_too() -> None:
    critic = config(ppo={"critic": {"kind": "adapter"}})
    more = phase(critic, "ppo", "score").flops - phase(config(), "ppo", "score").flops
    assert more == flops.forward(SMALL, Rows(16, 10), rank=2)


def test_a_reward_model_that_is_brought_is_one() -> None:
    of = config(stages=("ppo",), reward={"adapter": "adapter", "ensemble": 3})
    assert [role.name for role in forecast(of, SMALL, on_gpu=True).roles if role.name.startswith("reward")] == [
        "reward: an adapter and a head"
    ]
