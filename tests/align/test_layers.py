import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from align.adapters import AdaptedModel
from align.base import load_base
from align.config import AdaptersConfig, BaseModelConfig
from align.context import Sampling
from align.generation import Response, generate
from align.heads import ScalarHead
from align.kernels import few_rows, row_attention
from tests.resident import SHAPES, count_tokens, distance, randomize, resident, save_wide_llama, with_adapters

DTYPES = ("float32", "bfloat16")


def both(dtype: str, shape: str | Path = "llama") -> tuple[AdaptedModel, AdaptedModel]:
    """The same weights, plain and compiled."""
    models: list[AdaptedModel] = []
    for is_compiled in (False, True):
        base = dataclasses.replace(resident(shape, dtype=dtype).base, is_compiled=is_compiled)
        model = AdaptedModel(base, AdaptersConfig(rank=4))
        model.add("policy")
        randomize(model, "policy", scale=0.1)
        models.append(model)
    return models[0], models[1]


def learnt(
    model: AdaptedModel, ids_BS: Tensor, is_token_BS: Tensor | None = None, *, is_checkpointed: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """Last hidden states, 0 at padding, and the policy's gradients."""
    head, is_token_BS = ScalarHead(model.hidden_size).initialize(1), ids_BS >= 0 if is_token_BS is None else is_token_BS
    with model.role("policy", train=True):
        hidden_BSH = model.hidden(ids_BS, is_token_BS, is_checkpointed=is_checkpointed)
        loss = head(hidden_BSH)[is_token_BS].square().sum()
        gradients = torch.autograd.grad(loss, list(model.tensors("policy").values()))
    return hidden_BSH.detach() * is_token_BS[..., None], list(gradients)


@pytest.mark.slow  # a C++ compiler is at work
@pytest.mark.parametrize(("dtype", "is_packed"), [(d, p) for p in (False, True) for d in DTYPES])
def test_compiled_layers_say_the_same_with_and_without_gradients_and_what_plain_ones_say(
    dtype: str, is_packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row_attention.prepare()
    if is_packed and not row_attention._dtypes:  # pyright: ignore[reportPrivateUsage]
        pytest.skip("rows are packed for attention's kernel, which this CPU cannot have")
    monkeypatch.setattr(few_rows, "fits", lambda *_: False)  # so few tokens, but by the products that learning has
    shape_of = save_wide_llama(tmp_path) if is_packed else "llama"
    (plain, compiled), (whole, _) = both(dtype, shape_of), both("float32", shape_of)
    counts = count_tokens(compiled)
    torch._dynamo.reset()  # pyright: ignore[reportPrivateUsage]
    torch._dynamo.utils.counters.clear()  # pyright: ignore[reportPrivateUsage]
    for shape, num_alike, padding in (((3, 9), 4, 0), ((2, 14), 0, 3), ((4, 6), 5, 0)):
        ids_BS = torch.randint(0, 250, shape, generator=torch.Generator().manual_seed(0))
        ids_BS[:, :num_alike] = ids_BS[0, :num_alike]
        is_token_BS = torch.ones_like(ids_BS, dtype=torch.bool)
        is_token_BS[-1, shape[1] - padding :] = False
        hidden_BSH, gradients = learnt(compiled, ids_BS, is_token_BS)
        assert counts[-1] == ids_BS.numel() - ((shape[0] - 1) * num_alike + padding) * is_packed
        with torch.no_grad(), compiled.role("policy"):
            looked_BSH = compiled.hidden(ids_BS, is_token_BS)
        # to the bit: or the first ratio would not be 1
        assert torch.equal(looked_BSH[is_token_BS], hidden_BSH[is_token_BS])
        assert not looked_BSH.requires_grad
        again_BSH, checkpointed = learnt(compiled, ids_BS, is_token_BS, is_checkpointed=True)
        assert torch.equal(again_BSH, hidden_BSH)
        assert all(torch.equal(one, other) for one, other in zip(checkpointed, gradients, strict=True))
        # as near to float32's plain layers as plain layers of this dtype are
        exact_BSH, exact = learnt(whole, ids_BS, is_token_BS)
        plain_BSH, expected = learnt(plain, ids_BS, is_token_BS)
        assert distance(hidden_BSH, exact_BSH) <= 1.5 * distance(plain_BSH, exact_BSH) + 1e-5
        if is_packed and dtype == "bfloat16":  # with a third batch some tensor or other is further off, by chance
            gradients, expected, exact = ([torch.cat([t.flatten() for t in g])] for g in (gradients, expected, exact))
        for ours, theirs, true in zip(gradients, expected, exact, strict=True):
            assert distance(ours, true) <= 1.5 * distance(theirs, true) + 1e-4
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]  # pyright: ignore[reportPrivateUsage]
    assert graphs == 2  # the first layer's input has no gradient
    # outside of these passes the layers are plain, and nothing stays switched
    layers = [layer for layer in compiled.base.model.modules() if hasattr(layer, "self_attn")]
    assert len(layers) == 2
    assert all(layer._compiled_call_impl is None for layer in layers)  # pyright: ignore[reportPrivateUsage]
    compiled.verify_trainable()


@pytest.mark.slow
def test_compiled_decoding_says_what_plain_decoding_does_with_one_graph_for_every_width_and_length() -> None:
    """Rows of several lengths enter, leave, and make room for others; the last one goes on alone."""
    prompts = [(5, 6, 7), (8, 9), (10, 11, 12, 13), (14,), (15, 16, 17, 18, 19), (20, 21)]
    sampling = Sampling(temperature=1.0, max_response_length=24, max_prompt_length=8, batch_size=4)
    uniforms_BT = np.random.default_rng(0).random((len(prompts), sampling.max_response_length))

    def decoded(model: AdaptedModel) -> list[Response]:
        codec = dataclasses.replace(model.base.codec(None), eos_ids=tuple(range(20)))
        with model.role("policy"):
            return generate(model, codec, prompts, sampling=sampling, uniforms_BT=uniforms_BT)

    plain, compiled = both("float32")
    expected = decoded(plain)
    assert len({len(response.ids) for response in expected}) > 2
    torch._dynamo.utils.counters.clear()  # pyright: ignore[reportPrivateUsage]
    found = decoded(compiled)
    assert [response.ids for response in found] == [response.ids for response in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]  # pyright: ignore[reportPrivateUsage]
    assert 1 <= graphs <= 2  # one more where no row has padding, and so no mask


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "rows"), [("float32", 32), ("float32", 64), ("bfloat16", 64)])
def test_compiled_decoding_of_many_rows_is_as_near_to_float32_as_plain_decoding(
    dtype: str, rows: int, tmp_path: Path
) -> None:
    """Of this shape in bfloat16, g++ 12 -O3 made infinities of inductor's loops; 64 rows of float32 take none."""
    save_wide_llama(tmp_path)
    prompts = [(5 + row, *range(6, 7 + row % 9)) for row in range(rows)]
    sampling = Sampling(temperature=1.0, max_response_length=4, max_prompt_length=16, batch_size=len(prompts))
    uniforms_BT = np.full((len(prompts), 4), 0.5)

    def decoded(dtype: str, *, is_compiled: bool) -> list[Response]:
        fields = {"model": str(tmp_path), "dtype": dtype, "device": "cpu", "compile": is_compiled}
        base = load_base(BaseModelConfig.model_validate(fields))
        model = AdaptedModel(base, AdaptersConfig(rank=8))
        model.add("policy")
        randomize(model, "policy", scale=0.1)
        with model.role("policy"):
            return generate(model, base.codec(None), prompts, sampling=sampling, uniforms_BT=uniforms_BT)

    def gap(found: list[Response]) -> float:
        """Root mean square, of the responses that are the same and whole."""
        pairs = [(f, e) for f, e in zip(found, exact, strict=True) if f.ids == e.ids]
        assert len(pairs) > len(prompts) / 2
        return float(np.mean([np.subtract(f.logprobs, e.logprobs) ** 2 for f, e in pairs if len(f.ids) == 4]) ** 0.5)

    exact = decoded("float32", is_compiled=False)
    assert gap(decoded(dtype, is_compiled=True)) < 1e-4 + 2 * gap(decoded(dtype, is_compiled=False))


# ---- the layers below all adapters ----


def count_calls(model: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often each decoder layer's own forward has run."""
    counts = [0, 0]
    layers = max((m for m in model.trunk.modules() if isinstance(m, nn.ModuleList)), key=len)
    for number, layer in enumerate(layers):

        def counted(*args: Any, own: int = number, plain: Any = layer.forward, **kwargs: Any) -> Any:
            counts[own] += 1
            return plain(*args, **kwargs)

        monkeypatch.setattr(layer, "forward", counted)
    return counts


@pytest.mark.parametrize("shape", SHAPES)
def test_layers_below_all_adapters_run_once_a_batch_and_the_numbers_are_the_same(
    shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_adapters(shape, "sft", "policy", layers=1)
    counts = count_calls(model, monkeypatch)
    ids_BS = torch.randint(0, 250, (3, 9), generator=torch.Generator().manual_seed(0))

    def looked(ids_BS: Tensor, role: str) -> Tensor:
        with torch.no_grad(), model.role(role):
            return model.hidden(ids_BS)

    kept = [looked(ids_BS, "sft"), looked(ids_BS, "policy"), *learnt(model, ids_BS)[1]]
    assert counts == [1, 3]
    # a copy of the ids is another batch: nothing is known of it
    anew = [looked(ids_BS.clone(), "sft"), looked(ids_BS.clone(), "policy"), *learnt(model, ids_BS.clone())[1]]
    assert counts == [4, 6]
    assert all(torch.equal(one, other) for one, other in zip(kept, anew, strict=True))
    assert not torch.equal(kept[0], kept[1])


def test_an_adapter_added_below_ends_what_was_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = with_adapters("llama", "sft", layers=1)
    counts = count_calls(model, monkeypatch)
    ids_BS = torch.arange(6)[None]
    with torch.no_grad(), model.role("sft"):
        model.hidden(ids_BS)
    with_adapters("llama", "reward").save("reward", tmp_path)
    model.load("reward", tmp_path)
    with torch.no_grad(), model.role("reward"):
        first = model.hidden(ids_BS)
        assert torch.equal(model.hidden(ids_BS), first)
    assert counts == [3, 3]


def test_what_was_kept_goes_with_its_batch() -> None:
    model = with_adapters("llama", "sft", layers=1)
    said = model._decoder._said  # pyright: ignore[reportPrivateUsage]
    ids_BS = torch.arange(6)[None]
    with torch.no_grad(), model.role("sft"):
        model.hidden(ids_BS)
    assert len(said) == 1
    del ids_BS
    assert len(said) == 0


# ---- activation checkpointing ----


@pytest.mark.parametrize("shape", SHAPES)
def test_checkpointed_layers_keep_their_inputs_alone_and_give_the_same_gradients(shape: str) -> None:
    model = with_adapters(shape, "policy")
    ids_BS = torch.randint(0, 250, (3, 9), generator=torch.Generator().manual_seed(0))

    def run(*, is_checkpointed: bool) -> tuple[int, list[Tensor]]:
        kept = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal kept
            kept += 0 if isinstance(tensor, nn.Parameter) else tensor.numel()
            return tensor

        with model.role("policy", train=True):
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                hidden_BSH = model.hidden(ids_BS, is_checkpointed=is_checkpointed)
            return kept, list(torch.autograd.grad(hidden_BSH.square().sum(), list(model.tensors("policy").values())))

    (all_kept, plain), (inputs_kept, checkpointed) = run(is_checkpointed=False), run(is_checkpointed=True)
    assert inputs_kept < all_kept / 4
    assert all(torch.equal(one, other) for one, other in zip(plain, checkpointed, strict=True))


def test_an_adapter_that_reaches_a_layer_further_down_ends_what_was_kept(tmp_path: Path) -> None:
    config = LlamaConfig(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=3)
    config.num_attention_heads = config.num_key_value_heads = 2
    config.eos_token_id = config.pad_token_id = 256
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    resident().base.tokenizer.save_pretrained(tmp_path)
    deeper = resident(tmp_path, layers=2)
    deeper.add("policy")
    randomize(deeper, "policy")
    (tmp_path / "adapter").mkdir()
    deeper.save("policy", tmp_path / "adapter")
    model, ids_BS = resident(tmp_path, layers=1), torch.arange(6)[None]
    model.add("sft")
    with torch.no_grad(), model.role("sft"):
        model.hidden(ids_BS)  # of which two layers are kept
    model.load("policy", tmp_path / "adapter")
    with torch.no_grad(), model.role("policy"):
        assert torch.equal(model.hidden(ids_BS), model.hidden(ids_BS.clone()))
