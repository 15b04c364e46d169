"""Several reward models on one base, and the objectives from their rows to their report."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

import stages.reward.trainer
from align.adapters import AdaptedModel
from align.config import RewardConfig
from align.context import RewardInputs, StageContext, StageResult
from align.episodes import Episode
from align.heads import ScalarHead, load_head
from align.randomness import stage_seed
from data.tokenization import encode_comparisons
from stages.reward.objective import ensemble_scores
from stages.reward.scorer import Member, score
from stages.reward.train import add_members, run_reward
from stages.reward.trainer import ScoreTrainer
from tests.resident import resident
from tests.stages.scenes import SAMPLING, comparisons, context_of, hashes_of, metrics_of, verdicts

CPU = torch.device("cpu")
PAIRS = RewardInputs(None, comparisons(8), comparisons(6, start=50), SAMPLING)


def run(model: AdaptedModel, root: Path, inputs: RewardInputs = PAIRS, **settings: Any) -> StageResult:
    small = {"batch_size": 4, "micro_batch_size": 2, "max_length": 200, "learning_rate": 5e-3, **settings}
    return run_reward(RewardConfig.model_validate(small), inputs, context_of(model, root, "reward"))


def members_of(k: int, context: StageContext) -> list[Member]:
    context.model.add("sft", seed=1)
    return add_members(RewardConfig(ensemble=k), PAIRS, context)


def test_each_member_starts_from_sft_with_a_seed_and_a_head_of_its_own(tmp_path: Path) -> None:
    context = context_of(resident(), tmp_path, "reward")
    members = members_of(3, context)
    assert [member.name for member in members] == ["reward-1", "reward-2", "reward-3"]
    assert [member.seed for member in members] == [stage_seed(context.seed, member.name) for member in members]
    assert len({context.model.checksum(member.name) for member in members} | {context.model.checksum("sft")}) == 1
    heads = [member.head.weight for member in members]
    assert not any(torch.equal(heads[a], heads[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


def test_the_only_member_has_the_stages_own_seed_and_plain_names(tmp_path: Path) -> None:
    context = context_of(resident(), tmp_path, "reward")
    [member] = members_of(1, context)
    assert (member.name, member.suffix, member.seed) == ("reward", "", context.seed)
    assert torch.equal(member.head.weight, ScalarHead(context.model.hidden_size).initialize(context.seed).weight)


def test_members_see_all_rows_in_orders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []

    class Watched(ScoreTrainer):
        def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            seen.extend(tuple(row) for row in inputs["input_ids"].tolist())
            return super().compute_loss(model, inputs, *args, **kwargs)

    monkeypatch.setattr(stages.reward.trainer, "ScoreTrainer", Watched)
    model = resident()
    run(model, tmp_path, ensemble=2)
    first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert len(set(first)) == 16  # both responses of eight pairs
    assert sorted(first) == sorted(second)
    assert first != second
    assert model.checksum("reward-1") != model.checksum("reward-2")
    # and each logs under its own name
    names = [next(iter(line.keys() - {"step"})).partition("/")[0] for line in metrics_of(tmp_path / "reward")]
    assert names == ["reward-1"] * 2 + ["reward-2"] * 2


def test_an_ensembles_artifacts_come_member_by_member_and_are_what_was_trained(tmp_path: Path) -> None:
    model = resident()
    result = run(model, tmp_path, ensemble=2)
    folders = [artifact.path.name for artifact in result.artifacts]
    assert folders == ["adapter-1", "head-1", "adapter-2", "head-2"]
    assert [artifact.kind for artifact in result.artifacts] == ["adapter", "head"] * 2
    assert result.artifact("adapter").path.name == "adapter-1"
    for number in (1, 2):
        model.load(f"disk-{number}", tmp_path / "reward" / f"adapter-{number}")
        assert model.checksum(f"disk-{number}") == model.checksum(f"reward-{number}")
        _, statistics = load_head(tmp_path / "reward" / f"head-{number}", device=CPU)
        assert statistics is not None
        own = cast(list[dict[str, Any]], result.metrics["members"])[number - 1]
        assert (own["score_mean"], own["score_std"]) == (statistics.mean, statistics.std)


def test_the_only_members_folders_and_metrics_are_plain(tmp_path: Path) -> None:
    result = run(resident(), tmp_path)
    assert [artifact.path.name for artifact in result.artifacts] == ["adapter", "head"]
    assert "members" not in result.metrics


def test_the_first_member_does_not_depend_on_how_many_follow(tmp_path: Path) -> None:
    for k in (2, 3):
        run(resident(dropout=0.1), tmp_path / str(k), ensemble=k)
    two, three = (hashes_of(tmp_path / k / "reward") for k in ("2", "3"))
    own = [name for name in two if name.startswith(("adapter-", "head-"))]
    assert len(own) == 12
    assert all(two[name] == three[name] for name in own)


def test_the_same_seed_gives_the_same_ensemble(tmp_path: Path) -> None:
    for name in ("one", "same"):
        torch.manual_seed(len(name))
        run(resident(dropout=0.1), tmp_path / name, ensemble=2)
    assert hashes_of(tmp_path / "one" / "reward") == hashes_of(tmp_path / "same" / "reward")


def test_the_ensembles_metrics_are_those_of_its_mean_score(tmp_path: Path) -> None:
    model = resident()
    # sure and unsure pairs, some the wrong way round, so that the members do not agree on all
    held_out = (*comparisons(4, start=50), *comparisons(4, chosen="gold", rejected="sad", start=60))
    result = run(model, tmp_path, replace(PAIRS, held_out=held_out), ensemble=3)
    codec = model.base.codec(None)
    rows, _ = encode_comparisons(codec, held_out, max_length=200)
    scores, spreads = [], []
    for number in (1, 2, 3):
        head, statistics = load_head(tmp_path / "reward" / f"head-{number}", device=CPU)
        assert statistics is not None
        member = Member(f"reward-{number}", f"-{number}", 0, head)
        sides = [
            [Episode(row.prompt_ids, ids, has_eos=True) for row in rows for ids in (row.chosen_ids, row.rejected_ids)]
        ]
        scores.append(score(model, member, sides[0], pad_id=codec.pad_id, batch_size=2))
        spreads.append(statistics.std)
    mean_N = ensemble_scores(torch.stack(scores), torch.tensor(spreads))
    differences = mean_N[0::2] - mean_N[1::2]
    assert result.metrics["accuracy"] == (differences > 0).float().mean().item()
    assert result.metrics["margin"] == pytest.approx(differences.mean().item(), abs=1e-5)
    members = cast(list[dict[str, Any]], result.metrics["members"])
    for own, scores_N in zip(members, scores, strict=True):
        assert own["margin"] == pytest.approx((scores_N[0::2] - scores_N[1::2]).mean().item(), abs=1e-5)
        assert own["steps"] == own["kept_step"] == 2
    assert result.metrics["steps"] == 6


def test_k_members_cost_an_adapter_and_a_head_each_and_no_more(tmp_path: Path) -> None:
    # On a base and with adapters of the tiny size, so that a second copy of anything would show
    parameters: dict[int, int] = {}
    on_disk: dict[int, int] = {}
    for k in (1, 4):
        model = resident(rank=16)
        run(model, tmp_path / str(k), ensemble=k)
        folder = tmp_path / str(k) / "reward"
        files = [path for pattern in ("adapter*", "head*") for path in folder.glob(f"{pattern}/**/*")]
        on_disk[k] = sum(path.stat().st_size for path in files)
        parameters[k] = sum(tensor.numel() * tensor.element_size() for tensor in model.base.model.parameters())
        adapter = sum(t.numel() * t.element_size() for t in model.tensors(model.names[0]).values())
        head = sum(t.numel() * t.element_size() for t in ScalarHead(model.hidden_size).parameters())
    assert parameters[4] - parameters[1] <= 1.05 * 3 * (adapter + head)
    assert parameters[4] - parameters[1] >= 3 * adapter
    assert on_disk[4] - on_disk[1] <= 1.05 * 3 * on_disk[1]
    assert on_disk[4] >= 3.9 * on_disk[1]


def test_an_ensemble_may_start_from_an_adapter_that_was_brought(tmp_path: Path) -> None:
    brought = run(resident(), tmp_path / "first").artifact("adapter")
    model = resident()
    run(model, tmp_path / "second", replace(PAIRS, adapter=brought), ensemble=2, learning_rate=1e-12)
    model.load("brought", brought.path)
    for name in ("reward-1", "reward-2"):
        for own, before in zip(model.tensors(name).values(), model.tensors("brought").values(), strict=True):
            torch.testing.assert_close(own, before)


# ---- the other objectives ----


def test_verdicts_are_learnt(tmp_path: Path) -> None:
    model = resident()
    inputs = RewardInputs(None, verdicts(12), verdicts(9, start=60), SAMPLING)
    base = model.base_checksum()
    result = run(model, tmp_path, inputs, objective={"kind": "unpaired"}, epochs=12, learning_rate=1e-2)
    assert result.metrics["accuracy"] == result.metrics["auc"] == 1
    assert result.metrics["held_out_verdicts"] == 9
    assert cast(float, result.metrics["loss"]) < 0.4
    assert model.base_checksum() == base
    logged = metrics_of(tmp_path / "reward")
    assert logged[-1]["reward/accuracy"] == 1
    assert "reward/margin" not in logged[-1]


def test_an_ensemble_learns_verdicts_and_reads_them_by_the_same_0(tmp_path: Path) -> None:
    inputs = RewardInputs(None, verdicts(12), verdicts(9, start=60), SAMPLING)
    settings = {"objective": {"kind": "unpaired"}, "epochs": 12, "learning_rate": 1e-2}
    result = run(resident(), tmp_path, inputs, ensemble=2, **settings)
    members = cast(list[dict[str, Any]], result.metrics["members"])
    assert [own["accuracy"] for own in members] == [1, 1]
    assert result.metrics["accuracy"] == result.metrics["auc"] == 1


def test_ties_are_learnt_as_ties_and_wins_as_wins(tmp_path: Path) -> None:
    # Of two good responses neither is preferred; a good one is preferred to a bad one
    ties = tuple(
        replace(pair, preference=0.5) for pair in comparisons(8, chosen="good", rejected="also good", start=20)
    )
    inputs = RewardInputs(None, (*comparisons(8), *ties), comparisons(6, start=50), SAMPLING)
    model = resident()
    result = run(model, tmp_path, inputs, objective={"kind": "rao-kupper"}, epochs=12, learning_rate=1e-2)
    assert result.metrics["accuracy"] == 1
    # "also good" is a good response too: nearer to "good" than "bad" is
    codec = model.base.codec(None)
    head, _ = load_head(result.artifact("head").path, device=CPU)
    rows, _ = encode_comparisons(codec, ties, max_length=200)
    episodes = [
        Episode(row.prompt_ids, ids, has_eos=True) for row in rows for ids in (row.chosen_ids, row.rejected_ids)
    ]
    scores_N = score(model, Member("reward", "", 0, head), episodes, pad_id=codec.pad_id, batch_size=4)
    assert (scores_N[0::2] - scores_N[1::2]).abs().mean() < cast(float, result.metrics["margin"]) / 2


def test_a_margin_drives_scores_further_apart(tmp_path: Path) -> None:
    apart = [
        cast(float, run(resident(), tmp_path / str(margin), inputs, epochs=8, learning_rate=1e-2).metrics["margin"])
        for margin in (0.0, 3.0)
        for inputs in [replace(PAIRS, train=tuple(replace(pair, margin=margin) for pair in comparisons(8)))]
    ]
    assert apart[1] > apart[0] + 0.5
