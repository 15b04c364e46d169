"""No pickle is read from what users bring or runs leave: a malicious one, wherever it lies, is refused and not run."""

import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from align.artifacts import read_artifact
from align.base import load_base
from align.checkpoints import Checkpoint, load_newest, save_checkpoint
from align.config import BaseModelConfig
from align.errors import ArtifactError, ModelError
from align.heads import load_head
from align.scorers import Classifier
from tests.align.classifiers import write_classifier
from tests.resident import resident

ROOT = Path(__file__).parent.parent.parent


class Evil:
    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self._mark,)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "was-run"


def in_place_of(weights: Path, mark: Path, *, name: str) -> None:
    """A pickle where older software keeps weights, instead of the safetensors file."""
    weights.unlink()
    weights.with_name(name).write_bytes(pickle.dumps(Evil(mark)))


def test_the_pickle_of_these_tests_would_run(mark: Path) -> None:
    pickle.loads(pickle.dumps(Evil(mark)))
    assert mark.exists()


def test_a_base(tmp_path: Path, mark: Path) -> None:
    model = resident().base
    model.model.save_pretrained(tmp_path / "base")
    model.tokenizer.save_pretrained(tmp_path / "base")
    in_place_of(tmp_path / "base" / "model.safetensors", mark, name="pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        load_base(BaseModelConfig(model=str(tmp_path / "base"), device="cpu"))
    assert not mark.exists()


def test_an_adapter(tmp_path: Path, mark: Path) -> None:
    model = resident()
    model.add("sft")
    folder = tmp_path / "adapter"
    folder.mkdir()
    model.save("sft", folder)
    in_place_of(folder / "adapter_model.safetensors", mark, name="adapter_model.bin")
    with pytest.raises(ArtifactError, match="safetensors"):
        resident().load("sft", folder)
    assert not mark.exists()


def test_a_head(tmp_path: Path, mark: Path) -> None:
    (tmp_path / "head").mkdir()
    for name in ("head.safetensors", "head.bin", "pytorch_model.bin"):
        (tmp_path / "head" / name).write_bytes(pickle.dumps(Evil(mark)))
    with pytest.raises(ArtifactError):
        load_head(tmp_path / "head", device=torch.device("cpu"))
    assert not mark.exists()


def test_a_classifier(tmp_path: Path, mark: Path) -> None:
    folder = write_classifier(tmp_path / "classifier")
    in_place_of(folder / "model.safetensors", mark, name="pytorch_model.bin")
    with pytest.raises(ModelError, match="cannot be loaded"):
        Classifier(str(folder), revision=None, label="positive", sees_prompt=False, device=torch.device("cpu"))
    assert not mark.exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "trained.safetensors"])
def test_a_checkpoint(name: str, tmp_path: Path, mark: Path) -> None:
    groups = {"trained": {"x": torch.ones(1)}}
    artifact = save_checkpoint(tmp_path, Checkpoint(1, groups, {}), stage="ppo", base_identity="a", keep=1)
    (artifact.path / name).write_bytes(pickle.dumps(Evil(mark)))
    with pytest.raises(ArtifactError, match=re.escape(name)):
        read_artifact(artifact.path)
    assert load_newest(tmp_path, base_identity="a")[0] is None
    assert not mark.exists()


def test_nothing_of_ours_reads_pickles_but_what_ray_carries_between_its_own_processes() -> None:
    reading = re.compile(r"torch\.load\(|pickle\.loads?\(|Unpickler|joblib|allow_pickle=True|weights_only=False")
    found = {
        path.relative_to(ROOT).as_posix()
        for package in ("align", "stages", "data")
        for path in (ROOT / package).rglob("*.py")
        if reading.search(path.read_text(encoding="utf-8"))
    }
    assert found == {"align/fan_out.py"}
