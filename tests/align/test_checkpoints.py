from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import align.checkpoints
from align.artifacts import checkpoint_folders
from align.checkpoints import (
    Checkpoint,
    StageCheckpoints,
    load_newest,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
)
from align.config.section import PPOCheckpointsConfig
from align.errors import ArtifactError
from align.kernels import native
from tests.resident import resident
from tests.stages.scenes import context_of

BASE = "a" * 64


def of_step(step: int) -> Checkpoint:
    trained = {"policy/b": torch.full((2, 3), step / 3), "policy/a": torch.arange(4.0) * step}
    return Checkpoint(
        step, {"trained": trained, "optimizer": {"policy/a/step": torch.tensor(float(step))}}, {"kl": 0.1}
    )


def save(folder: Path, step: int, *, keep: int = 2, keep_best: int = 0, base: str = BASE) -> None:
    save_checkpoint(folder, of_step(step), stage="ppo", base_identity=base, keep=keep, keep_best=keep_best)


def steps_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_comes_back_exactly(tmp_path: Path) -> None:
    save(tmp_path, 7)
    found, notes = load_newest(tmp_path, base_identity=BASE)
    assert found is not None
    assert notes == []
    assert found.step == 7
    assert found.state["kl"] == 0.1
    for group, tensors in of_step(7).groups.items():
        assert found.groups[group].keys() == tensors.keys()
        assert all(torch.equal(found.groups[group][key], tensor) for key, tensor in tensors.items())


def test_equal_states_are_equal_bytes_whatever_the_order_of_their_names(tmp_path: Path) -> None:
    one = of_step(5)
    backwards = {group: dict(reversed(list(tensors.items()))) for group, tensors in one.groups.items()}
    save(tmp_path / "1", 5)
    save_checkpoint(tmp_path / "2", Checkpoint(5, backwards, one.state), stage="ppo", base_identity=BASE, keep=1)
    for path in (tmp_path / "1" / "update-00005").iterdir():
        assert path.read_bytes() == (tmp_path / "2" / "update-00005" / path.name).read_bytes()


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (2, 4, 6, 10):
        save(tmp_path, step)
    assert steps_in(tmp_path) == ["update-00006", "update-00010"]


def test_the_best_are_kept_besides_the_newest(tmp_path: Path) -> None:
    for step, quality in ((1, 0.5), (2, 0.9), (3, None), (4, 0.7), (5, 0.1), (6, None)):
        one = of_step(step)
        state = {**one.state, "quality": quality}
        save_checkpoint(
            tmp_path, Checkpoint(step, one.groups, state), stage="ppo", base_identity=BASE, keep=1, keep_best=2
        )
    assert steps_in(tmp_path) == ["update-00002", "update-00004", "update-00006"]
    (tmp_path / "update-00002" / "state.json").write_text("damaged")
    save(tmp_path, 7, keep=1, keep_best=2)
    assert steps_in(tmp_path) == ["update-00004", "update-00007"]


def test_a_damaged_newest_is_passed_over_with_a_note_and_the_older_one_taken(tmp_path: Path) -> None:
    save(tmp_path, 2)
    save(tmp_path, 4)
    (tmp_path / "update-00004" / "trained.safetensors").write_bytes(b"half")
    found, notes = load_newest(tmp_path, base_identity=BASE)
    assert found is not None
    assert found.step == 2
    assert len(notes) == 1
    assert "passed over" in notes[0]
    assert "update-00004 is damaged: trained.safetensors" in notes[0]


def test_a_checkpoint_that_was_passed_over_does_not_push_out_the_ones_made_after(tmp_path: Path) -> None:
    save(tmp_path, 2, keep=1)
    save(tmp_path, 4, keep=2)
    (tmp_path / "update-00004" / "trained.safetensors").write_bytes(b"half")
    save(tmp_path, 3, keep=1)  # resumed from 2
    found, _ = load_newest(tmp_path, base_identity=BASE)
    assert found is not None
    assert found.step == 3
    assert steps_in(tmp_path) == ["update-00003"]


def test_a_half_written_checkpoint_is_no_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 2)
    (tmp_path / ".update-00004.123.tmp").mkdir()
    found, notes = load_newest(tmp_path, base_identity=BASE)
    assert found is not None
    assert found.step == 2
    assert notes == []


def test_a_checkpoint_of_another_base_is_refused_naming_both(tmp_path: Path) -> None:
    save(tmp_path, 2, base="b" * 64)
    with pytest.raises(ArtifactError, match=r"base b{16}….*base is a{16}…"):
        load_newest(tmp_path, base_identity=BASE)


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert load_newest(tmp_path / "checkpoints", base_identity=BASE) == (None, [])


def test_another_environment_is_noted_with_what_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 2)
    here = align.checkpoints.environment()
    monkeypatch.setattr(align.checkpoints, "environment", lambda: {**here, "threads": 99})
    found, notes = load_newest(tmp_path, base_identity=BASE)
    assert found is not None
    assert notes == [f"resumed under another environment, so not bit-exact: threads: {here['threads']} → 99"]


def test_the_environment_holds_what_the_bits_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    here = align.checkpoints.environment()
    assert here["kernels"] == native.present()
    monkeypatch.setattr(native, "_present", {"few_rows-0123.so"})
    assert align.checkpoints.environment()["kernels"] == ["few_rows-0123.so"]
    assert here["threads"] == torch.get_num_threads()
    versions = here["versions"]
    assert isinstance(versions, dict)
    assert set(versions) == {"torch", "transformers", "peft", "trl"}


def steps_of_adam(model: nn.Linear, optimizer: torch.optim.Optimizer, count: int) -> None:
    for number in range(count):
        optimizer.zero_grad()
        model(torch.linspace(-1, 1, 3) * (number + 1)).square().sum().backward()
        optimizer.step()


def test_an_optimizer_goes_on_exactly_where_it_was(tmp_path: Path) -> None:
    def fresh() -> tuple[nn.Linear, torch.optim.AdamW, dict[Tensor, str]]:
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        names: dict[Tensor, str] = {tensor: name for name, tensor in model.named_parameters()}
        return model, torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1), names

    whole, optimizer, _ = fresh()
    steps_of_adam(whole, optimizer, 5)
    steps_of_adam(whole, optimizer, 3)

    first, optimizer, names = fresh()
    steps_of_adam(first, optimizer, 5)
    groups = {"trained": dict(first.named_parameters()), "optimizer": optimizer_tensors(optimizer, names)}
    save_checkpoint(tmp_path, Checkpoint(5, groups, {}), stage="ppo", base_identity=BASE, keep=1)
    found, _ = load_newest(tmp_path, base_identity=BASE)
    assert found is not None

    second, optimizer, names = fresh()
    steps_of_adam(second, optimizer, 1)  # what it holds by now is replaced
    second.load_state_dict(dict(found.groups["trained"]))
    restore_optimizer(optimizer, names, found.groups["optimizer"])
    steps_of_adam(second, optimizer, 3)
    assert torch.equal(second.weight, whole.weight)
    assert torch.equal(second.bias, whole.bias)


def test_a_checkpoint_is_due_so_many_minutes_after_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(align.checkpoints, "time", SimpleNamespace(monotonic=lambda: now[0]))
    config = PPOCheckpointsConfig.model_validate({"every": None, "every_minutes": 2})
    checkpoints = StageCheckpoints(config, context_of(resident(), tmp_path, "ppo"))
    due: list[bool] = []
    for seconds in (119.0, 120.0, 239.0, 240.0):
        now[0] = seconds
        due.append(checkpoints.is_due(1))
        if seconds == 120.0:
            checkpoints.save(1, {}, {})
    assert due == [False, True, False, True]


def test_the_environment_names_the_device() -> None:
    assert set(align.checkpoints.environment()) == {"threads", "cpu_capability", "kernels", "device", "versions"}


def test_checkpoints_are_in_the_order_of_their_steps_however_long_these_are(tmp_path: Path) -> None:
    for step in (99_998, 99_999, 100_000):
        checkpoint = Checkpoint(step, {"trained": {"a": torch.ones(1)}}, {"quality": float(step == 99_998)})
        save_checkpoint(tmp_path, checkpoint, stage="sft", base_identity="a", keep=2, keep_best=1)
    names = [path.name for path in checkpoint_folders(tmp_path)]
    assert names == ["update-99998", "update-99999", "update-100000"]
    newest, _ = load_newest(tmp_path, base_identity="a")
    assert newest is not None
    assert newest.step == 100_000
