import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from align.adapters import RAW_BASE, AdaptedModel
from align.config import AdaptersConfig
from align.errors import ArtifactError, ConfigError, InvariantError, ModelError
from align.restore import snapshot
from tests.resident import SHAPES, logits_of, randomize, resident, with_adapters

IDS = (5, 9, 200, 31, 7, 7, 80)
LINEAR = {  # inside a decoder layer, by the two last names; what "attention" and "mlp" pick
    "llama": (
        {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"},
        {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"},
    ),
    "gpt2": ({"attn.c_attn", "attn.c_proj"}, {"mlp.c_fc", "mlp.c_proj"}),
}
LINEAR["qwen2"] = LINEAR["llama"]


def trainable(model: AdaptedModel) -> set[str]:
    return {key for key, parameter in model.base.model.named_parameters() if parameter.requires_grad}


# ---- which parameters train ----


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("targets", ["all-linear", "attention", "mlp"])
@pytest.mark.parametrize("layers", ["all", 1])
def test_a_training_role_trains_its_own_lora_tensors_and_nothing_else(
    shape: str, targets: str, layers: str | int
) -> None:
    model = resident(shape, targets=targets, layers=layers)
    model.add("sft")
    model.add("policy", copy_of="sft")
    attention, mlp = LINEAR[shape]
    names = {"all-linear": attention | mlp, "attention": attention, "mlp": mlp}[targets]
    prefix = "transformer.h" if shape == "gpt2" else "model.layers"
    expected = {
        f"{prefix}.{layer}.{name}.lora_{side}.policy.weight"
        for layer in ((0, 1) if layers == "all" else (1,))
        for name in names
        for side in "AB"
    }
    assert trainable(model) == set()
    with model.role("policy", train=True):
        assert trainable(model) == expected
        with model.role("sft"):
            assert trainable(model) == set()
        assert trainable(model) == expected
        with model.role(RAW_BASE):
            assert trainable(model) == set()
    assert trainable(model) == set()


def test_roles_nest_and_leaving_one_restores_the_one_before_also_after_an_error() -> None:
    model = with_adapters("llama", "sft", "reward")
    plain = logits_of(model, IDS)
    with model.role("sft"):
        own = logits_of(model, IDS)
        assert not torch.equal(own, plain)
        with model.role("reward"):
            assert not torch.equal(logits_of(model, IDS), own)
        assert torch.equal(logits_of(model, IDS), own)
        with model.role(RAW_BASE):
            assert torch.equal(logits_of(model, IDS), plain)
        with pytest.raises(ZeroDivisionError), model.role(RAW_BASE):
            raise ZeroDivisionError
        assert torch.equal(logits_of(model, IDS), own)
    assert torch.equal(logits_of(model, IDS), plain)


def test_an_unknown_role_is_refused_and_the_adapters_are_named() -> None:
    model = resident()
    with pytest.raises(InvariantError, match="no adapter has been added yet"), model.role("sft"):
        pass
    model.add("sft")
    with (
        pytest.raises(InvariantError, match=r"role policy: there are only the adapters \('sft',\)"),
        model.role("policy"),
    ):
        pass
    with pytest.raises(InvariantError, match="sft is there already"):
        model.add("sft")


def test_a_flipped_requires_grad_is_found_and_named() -> None:
    model = with_adapters("llama", "sft", "policy")
    with model.role("policy", train=True):
        model.verify_trainable()
        for key in ("model.embed_tokens.weight", "model.layers.1.mlp.up_proj.lora_A.sft.weight"):
            parameter = model.base.model.get_parameter(key)
            parameter.requires_grad_(True)
            with pytest.raises(InvariantError, match=rf"role policy \(train=True\).*{key}"):
                model.verify_trainable()
            parameter.requires_grad_(False)
        model.base.model.get_parameter("model.layers.0.mlp.up_proj.lora_A.policy.weight").requires_grad_(False)
        with pytest.raises(InvariantError, match="requires_grad is wrong for 1"):
            model.verify_trainable()


def test_adding_or_loading_an_adapter_in_a_training_role_leaves_that_role_as_it_was(tmp_path: Path) -> None:
    model = with_adapters("llama", "sft")
    model.save("sft", tmp_path)
    with model.role("sft", train=True):
        before = trainable(model)
        model.add("reward", copy_of="sft")
        model.load("policy", tmp_path)
        assert trainable(model) == before


# ---- copies ----


@pytest.mark.parametrize("shape", SHAPES)
def test_a_copy_says_what_its_source_says_and_is_a_tensor_of_its_own(shape: str) -> None:
    model = with_adapters(shape, "sft")
    model.add("policy", copy_of="sft")
    with model.role("sft"):
        source = logits_of(model, IDS)
    with model.role("policy"):
        assert torch.equal(logits_of(model, IDS), source)
    randomize(model, "policy", seed=5)
    with model.role("policy"):
        assert not torch.equal(logits_of(model, IDS), source)
    with model.role("sft"):
        assert torch.equal(logits_of(model, IDS), source)


def test_a_new_adapter_changes_nothing_and_is_drawn_from_its_seed_alone() -> None:
    checksums: list[str] = []
    for noise, seed in ((1, 3), (2, 3), (1, 4)):
        model = resident()
        plain = logits_of(model, IDS)
        torch.manual_seed(noise)
        before = torch.random.get_rng_state()
        model.add("sft", seed=seed)
        assert torch.equal(torch.random.get_rng_state(), before)
        torch.testing.assert_close(logits_of(model, IDS), plain)  # by another library, perhaps
        with model.role(RAW_BASE):
            bare = logits_of(model, IDS)
        with model.role("sft"):
            assert torch.equal(logits_of(model, IDS), bare)
        checksums.append(model.checksum("sft"))
    assert checksums[0] == checksums[1] != checksums[2]


def test_dropout_is_off_in_every_role_that_does_not_train_by_itself() -> None:
    model = with_adapters("llama", "sft", dropout=0.5)
    for train in (False, True):
        with model.role("sft", train=train):
            assert torch.equal(logits_of(model, IDS), logits_of(model, IDS))


# ---- files ----


@pytest.mark.parametrize("shape", SHAPES)
def test_an_adapter_comes_back_from_disk_bit_for_bit_and_is_written_with_the_same_bytes(
    shape: str, tmp_path: Path
) -> None:
    model = with_adapters(shape, "sft", targets="attention", layers=1)
    with model.role("sft"):
        said = logits_of(model, IDS)
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    model.save("sft", tmp_path / "first")
    other = resident(shape)  # the file's own rank, targets and layers count, not this model's
    other.load("loaded", tmp_path / "first")
    with other.role("loaded"):
        assert torch.equal(logits_of(other, IDS), said)
    other.save("loaded", tmp_path / "second")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


@pytest.mark.parametrize("shape", SHAPES)
def test_plain_peft_loads_what_we_save(shape: str, tmp_path: Path) -> None:
    model = with_adapters(shape, "reward", "sft")
    with model.role("sft"):
        said = logits_of(model, IDS)
    model.save("sft", tmp_path)
    plain = resident(shape).base.model
    theirs = PeftModel.from_pretrained(plain, str(tmp_path)).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=torch.tensor([IDS])).logits[0], said)


@pytest.mark.parametrize("variant", [{}, {"use_dora": True}, {"lora_bias": True}, {"use_rslora": True}])
def test_an_adapter_saved_by_plain_peft_says_what_it_says_there(variant: dict[str, Any], tmp_path: Path) -> None:
    settings = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **variant)
    theirs = get_peft_model(resident().base.model, settings)
    for key, parameter in theirs.named_parameters():
        if "lora_" in key:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        said = theirs.eval()(input_ids=torch.tensor([IDS])).logits[0]
    theirs.save_pretrained(str(tmp_path))
    model = resident()
    model.load("sft", tmp_path)
    with model.role("sft"):
        torch.testing.assert_close(logits_of(model, IDS), said)
    assert trainable(model) == set()


SAVE = """
import sys
from pathlib import Path
from tests.resident import with_adapters
with_adapters("qwen2", "sft").save("sft", Path(sys.argv[1]))
"""


def test_two_processes_write_the_same_bytes(tmp_path: Path) -> None:
    # PEFT keeps target_modules in a set, whose order is another with every hash seed
    running = []
    for hash_seed in ("1", "2"):
        (tmp_path / hash_seed).mkdir()
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-c", SAVE, str(tmp_path / hash_seed)]
        running.append(subprocess.Popen(command, env=environment, cwd=Path(__file__).parents[2]))
    assert [process.wait(600) for process in running] == [0, 0]
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_an_adapter_of_another_shape_is_refused_naming_folder_and_base(tmp_path: Path) -> None:
    with_adapters("gpt2", "sft").save("sft", tmp_path)
    with pytest.raises(ArtifactError, match=r"does not fit the base tiny:llama") as caught:
        resident("llama").load("sft", tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_an_adapter_of_another_width_is_refused(tmp_path: Path) -> None:
    with_adapters("llama", "sft", targets=["q_proj"]).save("sft", tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    wider = {key: torch.zeros(t.shape[0], 48) if "lora_A" in key else t for key, t in tensors.items()}
    save_file(wider, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ArtifactError, match="does not fit the base tiny:llama"):
        resident("llama").load("sft", tmp_path)


def test_missing_and_unexpected_tensors_are_counted_and_named(tmp_path: Path) -> None:
    with_adapters("llama", "sft", targets=["q_proj"]).save("sft", tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    gone = next(key for key in tensors if "lora_B" in key)
    del tensors[gone]
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ArtifactError, match="0 unexpected and 1 missing"):
        resident("llama").load("sft", tmp_path)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_an_incomplete_or_damaged_adapter_folder_is_refused(name: str, tmp_path: Path) -> None:
    with_adapters("llama", "sft").save("sft", tmp_path)
    (tmp_path / name).write_bytes(b"\x00garbage")
    with pytest.raises(ArtifactError, match="is not a LoRA adapter"):
        resident("llama").load("sft", tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ArtifactError, match="is not a LoRA adapter"):
        resident("llama").load("sft", tmp_path)


def test_an_adapter_that_is_not_lora_is_refused(tmp_path: Path) -> None:
    config = IA3Config(target_modules=["q_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    get_peft_model(resident().base.model, config).save_pretrained(str(tmp_path))
    with pytest.raises(ArtifactError, match="LoRA"):
        resident("llama").load("sft", tmp_path)


@pytest.mark.parametrize(
    "extra", [{"modules_to_save": ["lm_head"]}, {"bias": "all"}, {"trainable_token_indices": [1, 2]}]
)
def test_an_adapter_that_brings_weights_of_the_base_itself_is_refused(extra: dict[str, object], tmp_path: Path) -> None:
    settings = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **extra}
    get_peft_model(resident("qwen2").base.model, LoraConfig(**settings)).save_pretrained(str(tmp_path))  # type: ignore[arg-type]
    model = resident("qwen2")
    before = model.base_checksum()
    with pytest.raises(ArtifactError, match=next(iter(extra))):
        model.load("sft", tmp_path)
    assert model.base_checksum() == before


@pytest.mark.parametrize("way", ["pissa", "olora"])
def test_an_adapter_whose_making_changes_the_base_is_refused(way: str, tmp_path: Path) -> None:
    settings = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=way)  # type: ignore[arg-type]
    get_peft_model(resident("llama").base.model, settings).save_pretrained(str(tmp_path))
    model = resident("llama")
    before = model.base_checksum()
    with pytest.raises(ArtifactError, match=f"init_lora_weights is '{way}'; it would change the base itself"):
        model.load("sft", tmp_path)
    assert model.base_checksum() == before


@pytest.mark.parametrize("place", ["lm_head", "embed_tokens"])
def test_an_adapter_outside_the_decoder_layers_is_refused(place: str, tmp_path: Path) -> None:
    settings = LoraConfig(r=2, target_modules=["q_proj", place], task_type="CAUSAL_LM")
    get_peft_model(resident("llama").base.model, settings).save_pretrained(str(tmp_path), save_embedding_layers=False)
    with pytest.raises(ArtifactError, match=f"adapts .*{place}: only linear layers inside decoder layers"):
        resident("llama").load("sft", tmp_path)


# ---- settings that do not fit ----


def test_an_unknown_target_is_named_beside_the_layers_that_there_are() -> None:
    with pytest.raises(ConfigError, match=r"adapters.targets: 'query'.*self_attn.q_proj"):
        resident("llama", targets=["q_proj", "query"])
    with pytest.raises(ConfigError, match=r"'q_proj' is no linear layer.*attn.c_attn"):
        resident("gpt2", targets=["q_proj"])


def test_a_target_with_two_names_picks_one_of_two_layers_that_share_their_last() -> None:
    model = resident("gpt2", targets=["attn.c_proj"])
    model.add("sft")
    assert {key.split(".lora_")[0] for key in model.tensors("sft")} == {
        f"transformer.h.{i}.attn.c_proj" for i in (0, 1)
    }


def test_more_layers_than_the_base_has_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"adapters\.layers: 3, but this base has 2 decoder layers"):
        resident("llama", layers=3)


# ---- the base ----


@pytest.mark.parametrize("shape", SHAPES)
def test_reset_leaves_the_base_as_it_was_loaded(shape: str) -> None:
    model = resident(shape)
    said, checksum, state = logits_of(model, IDS), model.base_checksum(), snapshot(model.base.model)
    for _ in range(2):  # and a second round of adapters finds nothing left of the first
        model.add("sft")
        randomize(model, "sft")
        model.add("policy", copy_of="sft")
        with model.role("policy", train=True):
            assert not torch.equal(logits_of(model, IDS), said)
        model.reset()
        assert snapshot(model.base.model) == state
        assert model.names == ()
        assert torch.equal(logits_of(model, IDS), said)
        assert model.base_checksum() == checksum
    fresh = resident(shape).base.model
    assert [type(module) for module in model.base.model.modules()] == [type(module) for module in fresh.modules()]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_base_checksum_is_the_same_with_adapters_and_another_after_one_weight_changed(shape: str) -> None:
    model = resident(shape)
    before = model.base_checksum()
    model.add("sft")
    randomize(model, "sft")
    assert model.base_checksum() == before
    with model.role("sft", train=True):
        assert model.base_checksum() == before
    last = list(model.base.model.parameters())[-1].data
    last.view(-1)[0] += 1e-6
    assert model.base_checksum() != before


def test_an_adapter_checksum_sees_one_changed_weight() -> None:
    model = with_adapters("llama", "sft")
    before = model.checksum("sft")
    assert model.checksum("sft") == before
    next(reversed(model.tensors("sft").values())).data.view(-1)[-1] += 1e-6
    assert model.checksum("sft") != before


def test_adapters_are_float32_on_a_bfloat16_base(tmp_path: Path) -> None:
    model = with_adapters("llama", "sft", dtype="bfloat16")
    model.add("policy", copy_of="sft")
    model.save("sft", tmp_path)
    model.load("again", tmp_path)
    for name in ("sft", "policy", "again"):
        assert {tensor.dtype for tensor in model.tensors(name).values()} == {torch.float32}
    assert model.checksum("again") == model.checksum("policy") == model.checksum("sft")


def test_a_model_that_does_more_to_its_logits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = resident("llama")
    plain = model.base.model.forward

    def scaled(*args: object, **kwargs: object) -> object:
        out = plain(*args, **kwargs)
        out.logits = out.logits * 1.01
        return out

    AdaptedModel(model.base, AdaptersConfig())
    monkeypatch.setattr(model.base.model, "forward", scaled)
    with pytest.raises(ModelError, match="LlamaForCausalLM does something to its logits"):
        AdaptedModel(model.base, AdaptersConfig())


@pytest.mark.parametrize(
    ("setting", "value"), [("logit_scale", 0.25), ("logits_scaling", 8.0), ("final_logit_softcapping", 0.05)]
)
def test_known_ways_to_scale_logits_are_applied(setting: str, value: float) -> None:
    model = resident("llama")
    hidden = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = model.lm_head.logits(hidden)
        setattr(model.base.model.config, setting, value)
        scaled = {
            "logit_scale": plain * value,
            "logits_scaling": plain / value,
            "final_logit_softcapping": torch.tanh(plain / value) * value,
        }[setting]
        torch.testing.assert_close(model.lm_head.logits(hidden), scaled)


def test_adapter_config_names_the_base_and_no_folder_of_this_machine(tmp_path: Path) -> None:
    with_adapters("llama", "sft").save("sft", tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny:llama"
    assert config["target_modules"] == sorted(config["target_modules"])
    assert config["inference_mode"] is True


def test_the_base_checksum_sees_a_changed_buffer() -> None:
    model = resident()
    model.base.model.register_buffer("scale", torch.ones(2))
    before = model.base_checksum()
    model.base.model.get_buffer("scale")[0] = 2
    assert model.base_checksum() != before


def test_an_adapter_that_repeats_layers_of_the_base_is_refused(tmp_path: Path) -> None:
    settings = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", layer_replication=[(0, 2), (0, 2)])
    get_peft_model(resident().base.model, settings).save_pretrained(str(tmp_path))
    with pytest.raises(ArtifactError, match="layer_replication"):
        resident().load("sft", tmp_path)


def test_two_adapters_of_one_seed_are_drawn_apart() -> None:
    model = resident()
    model.add("one", seed=0)
    model.add("other", seed=0)
    assert model.checksum("one") != model.checksum("other")
