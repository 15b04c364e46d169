import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from align import settings
from align.artifacts import Artifact, write_directory
from align.config import Config
from align.errors import ArtifactError, UsageError
from align.handover import (
    Handover,
    artifacts_of,
    brought,
    brought_head,
)
from align.intake import StageData
from align.pipeline import (
    Decision,
    RunCall,
    StepName,
    changes,
    decide,
    fingerprint,
    refuse_unfinished,
    steps_to_do,
    verify_allowed,
)
from align.results import (
    FinishedStep,
    Vitals,
    begin,
    changed_on_the_way,
    current_results,
    read_finished,
    write_finished,
)
from tests.align.recipe import write_recipe

BASE = "b" * 64
COMMAND = "align run small.yaml"
VITALS = Vitals(1.0, 2, None, 1, True, "float32", 0)


def config_with(folder: Path, *overrides: str) -> Config:
    return settings.load(write_recipe(folder), overrides)


def parts_of(config: Config, step: StepName = "sft", **inputs: str | None) -> Mapping[str, object]:
    return fingerprint(step, config, base_identity=BASE, data={f"data.{step}.train": "d1"}, inputs=inputs)


def finish(
    folder: Path, parts: Mapping[str, object], *, kinds: tuple[str, ...] = ("adapter",), text: str = "w"
) -> None:
    """A finished step as the driver leaves it: artifacts with these kinds, and its result."""

    def fill(path: Path) -> None:
        (path / "adapter_config.json").write_text(text)
        (path / "head.safetensors").write_text(text)

    artifacts = tuple(
        write_directory(folder / kind, fill, kind=kind, stage=folder.name, step=1, base_identity=BASE) for kind in kinds
    )
    write_finished(folder, FinishedStep(parts, artifacts, {"nll_after": 1.5}, {}, VITALS))


def leave_checkpoint(folder: Path, parts: Mapping[str, object], *, update: int = 10) -> Path:
    begin(folder, parts, keep=True)
    path = folder / "checkpoints" / f"update-{update:05d}"
    path.parent.mkdir(exist_ok=True)
    write_directory(
        path, lambda p: void((p / "state.json").write_text('{"split": 2}')), kind="checkpoint", stage="ppo",
        step=update, base_identity=BASE,
    )  # fmt: skip
    return path


def void(_: object) -> None: ...


def decided(
    folder: Path,
    parts: Mapping[str, object],
    **flags: Any,
) -> Decision:
    return decide("ppo", folder, parts, RunCall(COMMAND, **flags))


def given(step: str, config: Config, run: Path, *, base_identity: str = BASE) -> Mapping[str, Artifact | None]:
    handover = Handover(config, run, base_identity, COMMAND)
    return artifacts_of(handover.inputs(step, StageData((), (), {}, {})))


def test_evaluation_follows_ppo_and_only_ppo(tmp_path: Path) -> None:
    config = config_with(tmp_path)
    assert steps_to_do(config, None) == ("sft", "reward", "ppo", "evaluation")
    assert steps_to_do(config, "ppo") == ("ppo", "evaluation")
    assert steps_to_do(config, "sft") == ("sft",)


def test_a_stage_that_the_config_does_not_have_is_refused(tmp_path: Path) -> None:
    config = config_with(tmp_path, "run.stages=[sft]")
    with pytest.raises(UsageError, match=r"--stage reward: run\.stages of this config has only sft"):
        steps_to_do(config, "reward")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("sft.learning_rate=1e-3", "config sft.learning_rate changed (0.0001 → 0.001)"),
        ("base.dtype=bfloat16", "config base.dtype changed (float32 → bfloat16)"),
        ("base.device=auto", "config base.device changed (cpu → auto)"),
        ("base.trust_remote_code=true", "config base.trust_remote_code changed (False → True)"),
        ("adapters.rank=3", "config adapters.rank changed (2 → 3)"),
        ("adapters.targets=[a, b]", "config adapters.targets changed (all-linear → ['a', 'b'])"),
        ("run.seed=1", "config run.seed changed (0 → 1)"),
        ("data.system_prompt=Be kind", "config data.system_prompt changed"),
    ],
)
def test_what_changes_the_outcome_changes_the_fingerprint_and_is_said(tmp_path: Path, override: str, said: str) -> None:
    old, new = parts_of(config_with(tmp_path)), parts_of(config_with(tmp_path, override))
    assert changes(old, new) == said


@pytest.mark.parametrize(
    "override",
    [
        "run.name=other", "cluster.cpus=1", "tracking.tensorboard=true", "ppo.updates=9", "reward.epochs=3",
        "sft.adapter=elsewhere",  # whose contents count, as an input
    ],
)  # fmt: skip
def test_what_does_not_concern_the_step_leaves_its_fingerprint(tmp_path: Path, override: str) -> None:
    assert changes(parts_of(config_with(tmp_path)), parts_of(config_with(tmp_path, override))) == ""


def test_how_often_ppo_writes_checkpoints_does_not_change_what_it_learns(tmp_path: Path) -> None:
    old, new = (parts_of(config_with(tmp_path, f"ppo.checkpoints.every={n}"), "ppo") for n in (1, 2))
    assert changes(old, new) == ""


def test_reward_and_evaluation_depend_on_the_sampling_and_sft_does_not(tmp_path: Path) -> None:
    configs = [config_with(tmp_path, f"ppo.rollout.temperature={t}") for t in (1.0, 0.7)]
    for step in ("reward", "evaluation", "ppo"):
        assert "ppo.rollout.temperature" in changes(parts_of(configs[0], step), parts_of(configs[1], step))
    wider = config_with(tmp_path, "ppo.rollout.temperature=1.0", "ppo.rollout.batch_size=2")  # how, and not what
    assert not changes(parts_of(configs[0], "reward"), parts_of(wider, "reward"))
    assert "ppo.rollout.batch_size" in changes(parts_of(configs[0], "ppo"), parts_of(wider, "ppo"))
    assert changes(parts_of(configs[0]), parts_of(configs[1])) == ""


def test_changed_data_and_inputs_are_named_without_their_hashes(tmp_path: Path) -> None:
    config = config_with(tmp_path)
    old = fingerprint("reward", config, base_identity=BASE, data={"data.reward.train": "1"}, inputs={"sft": "1"})
    new = fingerprint("reward", config, base_identity=BASE, data={"data.reward.train": "2"}, inputs={"sft": "2"})
    assert changes(old, new) == "the rows of data.reward.train changed; its input changed (input.sft)"


def test_an_unchanged_finished_step_is_skipped_with_its_result(tmp_path: Path) -> None:
    parts = parts_of(config_with(tmp_path))
    finish(tmp_path / "ppo", parts)
    decision = decided(tmp_path / "ppo", parts)
    assert (decision.kind, decision.reason) == ("skip", "inputs unchanged")
    assert decision.finished is not None
    assert decision.finished.metrics == {"nll_after": 1.5}
    assert decision.finished.artifacts[0].path == tmp_path / "ppo" / "adapter"


def test_a_changed_finished_step_runs_again_and_says_why(tmp_path: Path) -> None:
    finish(tmp_path / "ppo", parts_of(config_with(tmp_path)))
    decision = decided(tmp_path / "ppo", parts_of(config_with(tmp_path, "sft.epochs=3")))
    assert (decision.kind, decision.reason) == ("run", "run again: config sft.epochs changed (1.0 → 3.0)")


def test_fresh_runs_even_what_is_unchanged(tmp_path: Path) -> None:
    parts = parts_of(config_with(tmp_path))
    finish(tmp_path / "ppo", parts)
    assert decided(tmp_path / "ppo", parts, fresh=True).kind == "run"


def test_a_finished_step_whose_artifact_was_touched_is_an_error(tmp_path: Path) -> None:
    parts = parts_of(config_with(tmp_path))
    finish(tmp_path / "ppo", parts)
    (tmp_path / "ppo" / "adapter" / "adapter_config.json").write_text("other")
    again = f"make it again: {COMMAND} --stage ppo --fresh$"
    with pytest.raises(ArtifactError, match=rf"adapter_config\.json differs .*{again}"):
        decided(tmp_path / "ppo", parts)
    shutil.rmtree(tmp_path / "ppo" / "adapter")
    with pytest.raises(ArtifactError, match=rf"there is no artifact at .*{again}"):
        decided(tmp_path / "ppo", parts)


def test_a_finished_step_whose_artifact_was_replaced_whole_is_an_error(tmp_path: Path) -> None:
    parts = parts_of(config_with(tmp_path))
    result = tmp_path / "ppo" / "result.json"
    finish(tmp_path / "ppo", parts)
    kept = result.read_text()
    finish(tmp_path / "ppo", parts, text="other")
    result.write_text(kept)
    with pytest.raises(ArtifactError, match="is not what its stage made"):
        decided(tmp_path / "ppo", parts)


def test_an_unfinished_ppo_is_neither_continued_nor_discarded_unasked(tmp_path: Path) -> None:
    parts = parts_of(config_with(tmp_path))
    leave_checkpoint(tmp_path / "ppo", parts)
    again = f"{COMMAND} --stage ppo --resume"
    with pytest.raises(UsageError, match=f"unfinished ppo .update-00010.*: {again}; .*{COMMAND} --stage ppo --fresh"):
        refuse_unfinished(tmp_path / "ppo", RunCall(COMMAND, stage="ppo"))
    assert decided(tmp_path / "ppo", parts, fresh=True).kind == "run"
    assert (tmp_path / "ppo" / "checkpoints" / "update-00010").is_dir()


def test_an_unfinished_step_goes_on_unless_it_changed(tmp_path: Path) -> None:
    parts = parts_of(config_with(tmp_path))
    leave_checkpoint(tmp_path / "ppo", parts)
    assert decided(tmp_path / "ppo", parts).kind == "resume"
    with pytest.raises(UsageError, match=r"sft\.epochs changed"):
        decided(tmp_path / "ppo", parts_of(config_with(tmp_path, "sft.epochs=3")))


def test_resume_continues_after_the_newest_whole_checkpoint(tmp_path: Path) -> None:
    parts = parts_of(config_with(tmp_path))
    leave_checkpoint(tmp_path / "ppo", parts, update=10)
    damaged = leave_checkpoint(tmp_path / "ppo", parts, update=20)
    assert decided(tmp_path / "ppo", parts, resume=True) == Decision("resume", "continues after update 20", split=2)
    (damaged / "state.json").write_text("cut")
    assert decided(tmp_path / "ppo", parts, resume=True) == Decision("resume", "continues after update 10", split=2)


@pytest.mark.parametrize(("step", "size"), [("ppo", "ppo.loss.micro_batch_size"), ("sft", "sft.micro_batch_size")])
def test_the_parts_of_another_micro_batch_are_not_gone_on_with(step: StepName, size: str, tmp_path: Path) -> None:
    leave_checkpoint(tmp_path / "ppo", parts_of(config_with(tmp_path), step))
    parts = parts_of(config_with(tmp_path, f"{size}=1"), step)
    decision = decided(tmp_path / "ppo", parts, resume=True, allowed=(size,))
    assert decision.split == 1


def test_a_refusal_names_all_that_changed(tmp_path: Path) -> None:
    changed = ("ppo.updates=6", "ppo.kl.coefficient=0.2", "ppo.loss.epochs=9", "base.compile=true", "run.seed=9")
    leave_checkpoint(tmp_path / "ppo", parts_of(config_with(tmp_path), "ppo"))
    with pytest.raises(UsageError) as raised:
        decided(tmp_path / "ppo", parts_of(config_with(tmp_path, *changed), "ppo"), resume=True)
    assert all(f"config {key.partition('=')[0]} changed" in str(raised.value) for key in changed)


def test_resume_with_only_damaged_checkpoints_is_an_error(tmp_path: Path) -> None:
    parts = parts_of(config_with(tmp_path))
    (leave_checkpoint(tmp_path / "ppo", parts) / "state.json").write_text("cut")
    with pytest.raises(ArtifactError, match="no checkpoint can be continued from"):
        decided(tmp_path / "ppo", parts, resume=True)


def test_resume_with_nothing_to_resume_simply_runs(tmp_path: Path) -> None:
    assert decided(tmp_path / "ppo", parts_of(config_with(tmp_path)), resume=True).kind == "run"


def test_resume_under_another_config_is_refused_naming_the_change(tmp_path: Path) -> None:
    leave_checkpoint(tmp_path / "ppo", parts_of(config_with(tmp_path), "ppo"))
    with pytest.raises(UsageError, match=r"--resume refused, ppo: config ppo\.updates changed \(4 → 6\)"):
        decided(tmp_path / "ppo", parts_of(config_with(tmp_path, "ppo.updates=6"), "ppo"), resume=True)


def test_a_change_that_is_allowed_by_its_name_is_gone_on_with_and_noted(tmp_path: Path) -> None:
    folder, before = tmp_path / "ppo", parts_of(config_with(tmp_path), "ppo")
    leave_checkpoint(folder, before)
    after = parts_of(config_with(tmp_path, "ppo.updates=6", "ppo.kl.coefficient=0.2"), "ppo")
    with pytest.raises(UsageError, match=r"ppo\.kl\.coefficient changed \(0\.05 → 0\.2\)\. .*--allow-change KEY"):
        decided(folder, after, resume=True, allowed=("ppo.updates",))
    decision = decided(folder, after, resume=True, allowed=("ppo.updates", "ppo.kl.coefficient"))
    assert "continues after update 10, though config ppo.updates changed (4 → 6); config ppo.kl" in decision.reason
    begin(folder, after, keep=True, changed=decision.changed)
    assert decided(folder, after, resume=True).changed == ""
    begin(folder, after, keep=True, changed="once more")
    assert changed_on_the_way(folder) == [decision.changed, "once more"]
    begin(folder, after, keep=False)
    begin(folder, after, keep=True, changed=decision.changed)
    assert changed_on_the_way(folder) == [decision.changed]
    assert decision.changed.startswith("after update 10, though config ppo.updates changed (4 → 6)")
    begin(folder, after, keep=False)
    assert changed_on_the_way(folder) == []


def test_a_finished_step_stands_under_a_change_that_is_allowed(tmp_path: Path) -> None:
    finish(tmp_path / "ppo", parts_of(config_with(tmp_path)))
    parts = parts_of(config_with(tmp_path, "sft.epochs=3"))
    decision = decided(tmp_path / "ppo", parts, resume=True, allowed=("sft.epochs",))
    assert (decision.kind, decision.reason) == ("skip", "stands though config sft.epochs changed (1.0 → 3.0)")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("adapters.rank", "a checkpoint cannot be continued under another one"),
        ("ppo.critic.kind", "a checkpoint cannot be continued under another one"),
        ("run.seed", "a checkpoint cannot be continued under another one"),
        ("ppo.update", r"did you mean ppo\.updates\?"),
        ("xyz", "write it as the refusal"),
    ],
)
def test_what_cannot_be_allowed_is_refused(name: str, said: str, tmp_path: Path) -> None:
    config = config_with(tmp_path)
    with pytest.raises(UsageError, match=f"--allow-change {name}: .*{said}"):
        verify_allowed([name], config, steps_to_do(config, None))
    verify_allowed(["ppo.updates", "data.ppo.train", "input.sft"], config, steps_to_do(config, None))
    verify_allowed(["ppo.rollout.batch_size"], config, steps_to_do(config, "reward"))  # needless there, and no mistake


def test_resume_does_not_overwrite_a_finished_stage_that_changed(tmp_path: Path) -> None:
    finish(tmp_path / "ppo", parts_of(config_with(tmp_path)))
    with pytest.raises(UsageError, match=r"--resume refused.*sft\.epochs"):
        decided(tmp_path / "ppo", parts_of(config_with(tmp_path, "sft.epochs=3")), resume=True)


def test_beginning_anew_leaves_nothing_and_beginning_to_resume_leaves_all(tmp_path: Path) -> None:
    folder = tmp_path / "ppo"
    leave_checkpoint(folder, {"a": 1})
    (folder / "rejects.jsonl").write_text("")
    begin(folder, {"a": 1}, keep=True)
    assert (folder / "checkpoints").is_dir()
    assert (folder / "rejects.jsonl").exists()
    begin(folder, {"a": 2}, keep=False)
    assert sorted(path.name for path in folder.iterdir()) == ["started.json"]


def test_a_stage_before_its_inputs_names_the_command_to_run_first(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"reward needs the results of sft; first run: {COMMAND} --stage sft"):
        given("reward", config_with(tmp_path), tmp_path)


def test_artifacts_of_another_base_are_refused_naming_both(tmp_path: Path) -> None:
    config = config_with(tmp_path)
    finish(tmp_path / "sft", parts_of(config))
    with pytest.raises(ArtifactError, match=r"was made on base bbbb.*this run's base is cccc"):
        given("reward", config, tmp_path, base_identity="c" * 64)


def test_every_step_gets_the_artifacts_that_earlier_ones_made(tmp_path: Path) -> None:
    config = config_with(tmp_path)
    finish(tmp_path / "sft", parts_of(config))
    finish(tmp_path / "reward", parts_of(config), kinds=("adapter", "head"))
    finish(tmp_path / "ppo", parts_of(config))
    found = given("evaluation", config, tmp_path)
    paths = {name: artifact and artifact.path.relative_to(tmp_path).as_posix() for name, artifact in found.items()}
    assert paths == {
        "sft": "sft/adapter", "reward_adapter": "reward/adapter", "reward_head": "reward/head", "policy": "ppo/adapter",
    }  # fmt: skip


def test_without_a_source_that_needs_it_no_reward_model_is_handed_on(tmp_path: Path) -> None:
    source = '{kind: function, function: "tests.align.scoring_functions:lengths"}'
    config = config_with(tmp_path, f"ppo.rewards.sources=[{source}]")
    finish(tmp_path / "sft", parts_of(config))
    assert list(given("ppo", config, tmp_path)) == ["sft"]


def test_reward_training_depends_on_the_adapter_that_it_starts_from(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "adapter_config.json").write_text("{}")
    config = config_with(tmp_path, "run.stages=[reward, ppo]", f"reward.adapter={tmp_path / 'mine'}")
    adapter = given("reward", config, tmp_path)["adapter"]
    assert adapter is not None
    assert adapter.path == tmp_path / "mine"


def test_without_an_sft_stage_the_sft_artifact_is_none_or_the_one_brought(tmp_path: Path) -> None:
    config = config_with(tmp_path, "run.stages=[reward, ppo]")
    assert given("reward", config, tmp_path)["sft"] is None
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "adapter_config.json").write_text("{}")
    config = config_with(tmp_path, "run.stages=[reward, ppo]", f"sft.adapter={tmp_path / 'mine'}")
    artifact = given("reward", config, tmp_path)["sft"]
    assert artifact is not None
    assert (artifact.stage, artifact.base_identity) == ("brought", "")


def test_a_brought_adapter_changes_its_hash_with_its_contents_and_must_be_one(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"sft\.adapter: .* holds no adapter_config\.json"):
        brought(tmp_path, kind="adapter", key="sft.adapter", base_identity=BASE)
    (tmp_path / "adapter_config.json").write_text("{}")
    first = brought(tmp_path, kind="adapter", key="sft.adapter", base_identity=BASE)
    (tmp_path / "weights").write_text("w")
    assert brought(tmp_path, kind="adapter", key="sft.adapter", base_identity=BASE).content_hash != first.content_hash


def test_a_brought_adapter_of_ours_is_verified_against_the_base(tmp_path: Path) -> None:
    finish(tmp_path / "sft", {})
    adapter = tmp_path / "sft" / "adapter"
    assert brought(adapter, kind="adapter", key="sft.adapter", base_identity=BASE).base_identity == BASE
    with pytest.raises(ArtifactError, match="was made on base"):
        brought(adapter, kind="adapter", key="sft.adapter", base_identity="c" * 64)


def test_a_brought_reward_adapter_needs_its_head_beside_it(tmp_path: Path) -> None:
    finish(tmp_path / "reward", {}, kinds=("adapter", "head"))
    assert brought_head(tmp_path / "reward" / "adapter", base_identity=BASE).kind == "head"
    with pytest.raises(ArtifactError, match="without its scalar head, which is looked for in"):
        brought_head(tmp_path / "elsewhere" / "adapter", base_identity=BASE)


def test_results_made_from_a_replaced_artifact_no_longer_count(tmp_path: Path) -> None:
    finish(tmp_path / "sft", {})
    made = read_finished(tmp_path / "sft")
    assert made is not None
    finish(tmp_path / "reward", {"input.sft": made.artifacts[0].content_hash})
    assert list(current_results(tmp_path, ["sft", "reward"])) == ["sft", "reward"]
    finish(tmp_path / "sft", {}, text="trained otherwise")
    assert list(current_results(tmp_path, ["sft", "reward"])) == ["sft"]
    assert list(current_results(tmp_path, ["reward"])) == ["reward"]  # whose sft was brought


def test_results_made_from_what_is_being_made_again_no_longer_count(tmp_path: Path) -> None:
    finish(tmp_path / "ppo", {"input.sft": None})
    made = read_finished(tmp_path / "ppo")
    assert made is not None
    finish(tmp_path / "evaluation", {"input.policy": made.artifacts[0].content_hash})
    assert list(current_results(tmp_path, ["sft", "ppo", "evaluation"])) == ["ppo", "evaluation"]
    begin(tmp_path / "ppo", {}, keep=False)
    assert list(current_results(tmp_path, ["sft", "ppo", "evaluation"])) == []


def test_a_result_of_another_version_is_an_error_and_not_a_crash(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text('{"artifacts": []}')
    with pytest.raises(ArtifactError, match="not of this version of align"):
        read_finished(tmp_path)


def test_the_head_of_a_brought_reward_adapter_is_verified_against_the_base(tmp_path: Path) -> None:
    finish(tmp_path, {}, kinds=("head",))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")  # PEFT's own, which names no base
    config = config_with(tmp_path, "run.stages=[ppo]", f"reward.adapter={tmp_path / 'adapter'}")
    assert given("ppo", config, tmp_path)["reward_head"] is not None
    with pytest.raises(ArtifactError, match="was made on base"):
        given("ppo", config, tmp_path, base_identity="c" * 64)


def test_evaluation_depends_on_what_scores_the_answers(tmp_path: Path) -> None:
    old, new = (parts_of(config_with(tmp_path, f"ppo.rewards.clip={clip}"), "evaluation") for clip in (5.0, 2.0))
    assert changes(old, new) == "config ppo.rewards.clip changed (5.0 → 2.0)"


@pytest.mark.parametrize(
    "name", ["base.identity", "adapters.targets", "adapters.layers", "ppo.advantage.estimator", "reward.ensemble"]
)
def test_what_a_checkpoints_tensors_are_of_cannot_be_allowed_to_change(name: str, tmp_path: Path) -> None:
    config = config_with(tmp_path)
    with pytest.raises(UsageError, match="a checkpoint cannot be continued under another one"):
        verify_allowed([name], config, steps_to_do(config, None))


def test_a_finished_stage_with_checkpoints_is_not_unfinished(tmp_path: Path) -> None:
    parts = parts_of(config_with(tmp_path))
    leave_checkpoint(tmp_path / "ppo", parts)
    with pytest.raises(UsageError, match="holds an unfinished ppo"):
        refuse_unfinished(tmp_path / "ppo", RunCall(COMMAND))
    finish(tmp_path / "ppo", parts)
    refuse_unfinished(tmp_path / "ppo", RunCall(COMMAND))  # raises nothing now
