"""Each option of the loss and of the advantage, in the learner."""

from collections.abc import Callable

import pytest
import torch

from align.adapters import AdaptedModel
from align.episodes import policy_pass, text_pass
from data.tokenization import TokenizedDemonstration
from stages.ppo import objective
from stages.ppo.learn import Experience, Texts
from tests.stages.ppo.lesson import SCALE, gradients_of_one_minibatch, learn, lesson_of, scene
from tests.stages.scenes import reward_model_of

TEXTS = Texts([TokenizedDemonstration(tuple(range(40, 44 + n)), (False, *[True] * (3 + n))) for n in range(5)], 0)
OPTIONS: dict[str, dict[str, dict[str, object]]] = {
    "by sequence": {"loss": {"average": "sequence"}},
    "entropy bonus": {"loss": {"entropy_bonus": 5.0}},
    "k2 in the loss": {"kl": {"place": "loss", "coefficient": 0.5}},
    "k3 in the loss": {"kl": {"place": "loss", "coefficient": 0.5, "estimator": "k3"}},
    "rloo": {"advantage": {"estimator": "rloo"}, "rollout": {"responses_per_prompt": 4}},
    "grpo": {"advantage": {"estimator": "grpo"}, "rollout": {"responses_per_prompt": 4}},
    "whitened rewards": {"rewards": {"whiten": True}},
    "ptx": {"loss": {"ptx_coefficient": 0.7, "ptx_batch_size": 5}},
    "length penalty": {"rewards": {"length_penalty": 3.0}},
    "higher clip": {"loss": {"clip_high": 0.5}},
}


def kind_of(option: str) -> str:
    return "none" if option in ("rloo", "grpo") else "head"


@pytest.mark.parametrize("option", [name for name in OPTIONS if name != "higher clip"])
def test_an_option_changes_the_gradient_and_the_micro_batch_size_does_not(
    option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, texts = kind_of(option), TEXTS if option == "ptx" else None

    def gradients(size: int, **sections: dict[str, object]) -> torch.Tensor:
        own = texts if sections == OPTIONS[option] else None
        return gradients_of_one_minibatch(kind, size, monkeypatch, dtype="float64", texts=own, **sections)

    whole = gradients(8, **OPTIONS[option])
    if kind == "head":
        plain = gradients(8)
        assert ((whole - plain).norm() / plain.norm()).item() > 1e-3
    for size in (1, 4):
        assert ((gradients(size, **OPTIONS[option]) - whole).norm() / whole.norm()).item() < 1e-6


def entropy_of(model: AdaptedModel, lesson: list[Experience]) -> float:
    with torch.no_grad(), model.role("policy"):
        passes = [policy_pass(model, own.mb.batch, with_entropy=True) for own in lesson]
    return sum(out.entropy_BT.sum().item() for out in passes if out.entropy_BT is not None)


def test_an_entropy_bonus_keeps_the_policy_more_uncertain() -> None:
    found: dict[float, float] = {}
    for bonus in (0.0, 5.0):
        model, learner, lesson, config = scene(loss={"epochs": 8, "entropy_bonus": bonus})
        learn(learner, lesson, config, model)
        found[bonus] = entropy_of(model, lesson)
    assert found[5.0] > found[0.0]


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_a_kl_term_in_the_loss_holds_the_policy_at_the_reference(estimator: str) -> None:
    distances: dict[float, float] = {}
    for coefficient in (0.0, 20.0):
        kl = {"place": "loss", "coefficient": coefficient, "estimator": estimator}
        model, learner, lesson, config = scene(kl=kl, loss={"epochs": 8})
        learn(learner, lesson, config, model)
        with torch.no_grad(), model.role("policy"):
            own = [(policy_pass(model, one.mb.batch).logprobs_BT, one.mb.ref_logprobs_BT) for one in lesson]
        gaps = [(logprobs_BT - ref_BT).square().sum() for logprobs_BT, ref_BT in own]
        distances[coefficient] = sum(gap.item() for gap in gaps)
    assert distances[20.0] < 0.5 * distances[0.0]


def test_ptx_teaches_the_texts_beside_the_rollout() -> None:
    found: dict[float, float] = {}
    for coefficient in (0.0, 3.0):
        model, learner, lesson, config = scene(loss={"ptx_coefficient": coefficient, "ptx_batch_size": 2})
        metrics = learn(learner, lesson, config, model, texts=TEXTS if coefficient else None)
        assert ("loss/ptx" in metrics) == bool(coefficient)
        with torch.no_grad(), model.role("policy"):
            found[coefficient] = text_pass(model, TEXTS.rows, pad_id=TEXTS.pad_id).mean().item()
    assert found[3.0] > found[0.0] + 0.01


def test_while_the_critic_warms_up_the_policy_stays_and_then_moves() -> None:
    for kind in ("head", "adapter"):
        model, learner, lesson, config = scene(kind, critic={"warmup_updates": 1})
        before = learner.snapshot()
        metrics = learn(learner, lesson, config, model, update=0)
        assert "loss/policy" not in metrics
        assert metrics["policy/approxkl"] == 0
        moved = {name for name, tensor in learner.snapshot().items() if not torch.equal(tensor, before[name])}
        assert moved == {name for name in before if not name.startswith("policy/")}
        learn(learner, lesson, config, model, update=1)
        now = learner.snapshot()
        assert all(not torch.equal(now[name], before[name]) for name in before if name.startswith("policy/"))


@pytest.mark.parametrize(("estimator", "formula"), [("rloo", objective.rloo), ("grpo", objective.grpo)])
def test_group_advantages_find_a_prompts_responses_wherever_they_stand(estimator: str, formula: object) -> None:
    _, learner, lesson, _ = scene(
        "none", advantage={"estimator": estimator}, rollout={"responses_per_prompt": 4}, kl={"coefficient": 0.0}
    )
    assert learner.critic is None
    assert {name.split("/")[0] for name in learner.names.values()} == {"policy"}
    rows: dict[int, list[tuple[float, float]]] = {0: [], 1: []}
    for one in lesson:
        mb, advantages_BT = one.mb, one.advantages_BT
        for row, group in enumerate(mb.group_B.tolist()):
            own = advantages_BT[row][mb.is_response_BT[row]]
            assert len(set(own.tolist())) == 1  # one value for all of a response's tokens
            assert not advantages_BT[row][~mb.is_response_BT[row]].any()
            score = mb.scores["reward"][row].item() - 0.1 * (not mb.has_eos_B[row].item())
            rows[group].append((score, own[0].item()))
    for pairs in rows.values():
        returns, advantages = (torch.tensor(column) for column in zip(*pairs, strict=True))
        torch.testing.assert_close(formula(returns[None])[0], advantages, atol=1e-4, rtol=1e-4)  # type: ignore[operator]


@pytest.mark.parametrize("kind", ["head", "adapter"])
def test_checkpointing_layers_changes_no_gradient(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    plain = AdaptedModel.hidden

    def watched(self: AdaptedModel, *rows: torch.Tensor, is_checkpointed: bool = False) -> torch.Tensor:
        if torch.is_grad_enabled():
            asked.append(is_checkpointed)
        return plain(self, *rows, is_checkpointed=is_checkpointed)

    monkeypatch.setattr(AdaptedModel, "hidden", watched)
    gradients = [
        gradients_of_one_minibatch(
            kind, 4, monkeypatch, texts=TEXTS, loss={"ptx_coefficient": 0.7, "gradient_checkpointing": is_on}
        )
        for is_on in (False, True)
    ]
    assert torch.equal(*gradients)
    assert asked == [False] * (len(asked) // 2) + [True] * (len(asked) // 2)


def test_the_ptx_loss_is_the_mean_nll_of_the_learnt_tokens_times_its_coefficient() -> None:
    loss = {"epochs": 1, "minibatches": 1, "ptx_coefficient": 0.7, "ptx_batch_size": 5}
    model, learner, lesson, config = scene(loss=loss)
    with torch.no_grad(), model.role("policy"):
        expected = -0.7 * text_pass(model, TEXTS.rows, pad_id=TEXTS.pad_id).mean().item()
    assert learn(learner, lesson, config, model, texts=TEXTS)["loss/ptx"] == pytest.approx(expected, rel=1e-5)


def test_while_the_critic_warms_up_no_text_is_learnt_either() -> None:
    model, learner, lesson, config = scene(
        critic={"warmup_updates": 1}, loss={"ptx_coefficient": 3.0, "ptx_batch_size": 2}
    )
    before = model.checksum("policy")
    assert "loss/ptx" not in learn(learner, lesson, config, model, update=0, texts=TEXTS)
    assert model.checksum("policy") == before


@pytest.mark.parametrize(("estimator", "formula"), [("k2", objective.kl_k2), ("k3", objective.kl_k3)])
def test_the_kl_term_in_the_loss_is_the_mean_of_the_estimator_that_was_asked_for(
    estimator: str, formula: Callable[..., torch.Tensor]
) -> None:
    kl = {"place": "loss", "coefficient": 0.5, "estimator": estimator}
    model, learner, _, config = scene(kl=kl, loss={"epochs": 1, "minibatches": 1})
    for tensor in model.tensors("policy").values():  # as in a later update: away from the reference
        tensor.data.add_(0.05)
    lesson = lesson_of(model, learner, reward_model_of(model, SCALE), config)
    mbs = [own.mb for own in lesson]
    values_N = torch.cat([formula(mb.logprobs_BT, mb.ref_logprobs_BT)[mb.is_response_BT] for mb in mbs])
    assert learn(learner, lesson, config, model)["loss/kl"] == pytest.approx(0.5 * values_N.mean().item(), rel=1e-4)
