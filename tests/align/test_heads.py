from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from align.errors import ArtifactError
from align.heads import ScalarHead, ScoreStatistics, load_head, save_head

CPU = torch.device("cpu")


def test_a_head_is_one_dot_product_and_a_bias() -> None:
    head = ScalarHead(3)
    head.weight.data, head.bias.data = torch.tensor([[1.0, -2.0, 0.5]]), torch.tensor([0.25])
    # 4 − 2·1 + 0.5·2 + 0.25
    assert head(torch.tensor([4.0, 1.0, 2.0])).item() == 3.25
    assert head(torch.zeros(2, 5, 3)).shape == (2, 5, 1)


def test_a_head_computes_in_float32_on_bfloat16_states() -> None:
    head = ScalarHead(64).initialize(0)
    hidden = torch.randn(64, generator=torch.Generator().manual_seed(0)).bfloat16()
    out = head(hidden)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out[0], (hidden.float() * head.weight[0]).sum(), rtol=1e-5, atol=1e-6)


def test_a_new_head_says_0_and_an_initialised_one_is_drawn_from_its_seed_alone() -> None:
    assert not ScalarHead(8)(torch.ones(8)).any()
    before = torch.random.get_rng_state()
    one, same, other = (ScalarHead(4096).initialize(seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(one.weight, same.weight)
    assert not torch.equal(one.weight, other.weight)
    assert one.weight.std().item() == pytest.approx(1 / 4097**0.5, rel=0.05)


def test_a_head_and_its_statistics_come_back_from_disk_frozen(tmp_path: Path) -> None:
    head = ScalarHead(16).initialize(0)
    head.bias.data.fill_(-0.5)
    save_head(head, tmp_path, ScoreStatistics(0.1, 2.5, 7))
    loaded, statistics = load_head(tmp_path, device=CPU)
    assert torch.equal(loaded.weight, head.weight)
    assert torch.equal(loaded.bias, head.bias)
    assert statistics == ScoreStatistics(0.1, 2.5, 7)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_a_head_without_statistics_has_none(tmp_path: Path) -> None:
    save_head(ScalarHead(4), tmp_path)
    assert load_head(tmp_path, device=CPU)[1] is None


def test_equal_heads_are_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save_head(ScalarHead(16).initialize(0), tmp_path / name, ScoreStatistics(0.1, 2.5, 7))
    for name in ("head.safetensors", "statistics.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_folder_without_a_head_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"holds no head\.safetensors"):
        load_head(tmp_path, device=CPU)


def test_a_damaged_head_is_refused(tmp_path: Path) -> None:
    (tmp_path / "head.safetensors").write_bytes(b"\x00garbage")
    with pytest.raises(ArtifactError, match=r"head\.safetensors is damaged"):
        load_head(tmp_path, device=CPU)


@pytest.mark.parametrize("tensors", [{"weight": (1, 4)}, {"weight": (2, 4), "bias": (2,)}, {"kernel": (1, 4)}])
def test_a_file_that_holds_no_scalar_head_is_refused(tensors: dict[str, tuple[int, ...]], tmp_path: Path) -> None:
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, tmp_path / "head.safetensors")
    with pytest.raises(ArtifactError, match="expected a scalar head"):
        load_head(tmp_path, device=CPU)


@pytest.mark.parametrize("text", ["{}", '{"mean": 0, "std": null, "num_responses": 1}', "[]", "{"])
def test_damaged_statistics_are_refused(text: str, tmp_path: Path) -> None:
    save_head(ScalarHead(4), tmp_path)
    (tmp_path / "statistics.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"statistics\.json"):
        load_head(tmp_path, device=CPU)
