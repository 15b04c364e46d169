from dataclasses import replace
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import align.generation
from align.adapters import AdaptedModel
from align.context import Sampling
from align.episodes import Episode, collate, policy_pass
from align.generation import Response, generate, sample
from align.randomness import keyed_uniforms
from align.slots import Slots
from tests.resident import SHAPES, logits_of, with_adapters

SAMPLING = Sampling(temperature=1.0, max_response_length=6, max_prompt_length=64, batch_size=8)
NO_EOS = torch.tensor([], dtype=torch.int64)
PROMPTS = [tuple(range(10 * n, 11 * n + 1)) for n in range(8)]  # of 1 to 8 tokens
LAST_TOKEN = 1 - 2**-53  # the largest uniform there is picks the vocabulary's last token: an EOS in all tiny models


def respond(
    model: AdaptedModel, prompts: list[tuple[int, ...]], uniforms_BT: np.ndarray, **changes: int | float
) -> list[Response]:
    with model.role("sft"):
        return generate(
            model, model.base.codec(None), prompts, sampling=replace(SAMPLING, **changes), uniforms_BT=uniforms_BT
        )


def uniforms(count: int = len(PROMPTS), *, ends: dict[int, int] | None = None, length: int = 6) -> np.ndarray:
    """Keyed uniforms; `ends` says for some rows at which step they draw EOS."""
    drawn = 0.9 * keyed_uniforms(0, "test", 0, list(range(count)), length)
    for row, step in (ends or {}).items():
        drawn[row, step] = LAST_TOKEN
    return drawn


# ---- responses ----


@pytest.mark.parametrize("shape", SHAPES)
def test_a_response_is_the_same_whatever_the_batch_size_and_whichever_others_are_beside(shape: str) -> None:
    model = with_adapters(shape, "sft")
    drawn = uniforms(ends={0: 0, 3: 2, 4: 4, 6: 2})
    alone = respond(model, PROMPTS, drawn, batch_size=1)
    assert len({response.ids for response in alone}) > 4
    order = [5, 2, 7, 0, 3, 6, 1, 4]
    shuffled = respond(model, [PROMPTS[i] for i in order], drawn[order], batch_size=3)
    for found in (
        respond(model, PROMPTS, drawn, batch_size=8),
        respond(model, PROMPTS, drawn, batch_size=3),
        [shuffled[order.index(i)] for i in range(8)],
    ):
        assert [(response.ids, response.has_eos) for response in found] == [(r.ids, r.has_eos) for r in alone]
        for one, other in zip(found, alone, strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_prompts_of_many_lengths_see_the_positions_that_each_has_alone(shape: str) -> None:
    # Eight prompts of eight lengths side by side; each next token's logprob against a forward pass of that row alone
    model = with_adapters(shape, "sft")
    responses = respond(model, PROMPTS, uniforms(), temperature=1.0)
    with model.role("sft"):
        for prompt, response in zip(PROMPTS, responses, strict=True):
            logprobs_SV = logits_of(model, prompt + response.ids).log_softmax(-1)
            expected = [logprobs_SV[len(prompt) + t - 1, token].item() for t, token in enumerate(response.ids)]
            assert response.logprobs == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_samplers_logprobs_are_the_trainers(shape: str) -> None:
    model = with_adapters(shape, "sft")
    responses = respond(model, PROMPTS, uniforms(ends={1: 3}), temperature=0.6)
    episodes = [Episode(p, r.ids, r.has_eos) for p, r in zip(PROMPTS, responses, strict=True)]
    batch = collate(episodes, pad_id=model.base.codec(None).pad_id, device=model.device)
    with torch.no_grad(), model.role("sft"):
        trainers_BT = policy_pass(model, batch, temperature=0.6).logprobs_BT
    for row, response in enumerate(responses):
        assert trainers_BT[row, : len(response.ids)].tolist() == pytest.approx(response.logprobs, abs=1e-4)


def test_a_response_ends_with_its_eos_and_one_without_has_the_full_length() -> None:
    model = with_adapters("llama", "sft")
    codec = model.base.codec(None)
    responses = respond(model, PROMPTS[:3], uniforms(3, ends={0: 0, 1: 3}), batch_size=3)
    assert [len(response.ids) for response in responses] == [1, 4, 6]
    assert [response.has_eos for response in responses] == [True, True, False]
    for response in responses:
        assert len(response.logprobs) == len(response.ids)
        assert not set(response.ids[:-1]) & set(codec.eos_ids)  # nothing after EOS
        assert (response.ids[-1] in codec.eos_ids) == response.has_eos


def test_any_listed_eos_stops_a_response() -> None:
    model = with_adapters("qwen2", "sft")
    codec = model.base.codec(None)
    assert codec.eos_ids == (256, 258)
    with model.role("sft"):
        cdf_V = logits_of(model, PROMPTS[2])[-1].softmax(-1).double().cumsum(-1)
    drawn = uniforms(2)
    for row, token in enumerate(codec.eos_ids):
        drawn[row, 0] = (cdf_V[token - 1] + cdf_V[token]).item() / 2
    responses = respond(model, [PROMPTS[2]] * 2, drawn)
    assert [(r.ids, r.has_eos) for r in responses] == [((256,), True), ((258,), True)]


def watched_rows(model: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(rows, tokens a row) of every forward pass from now on; of packed rows (1, their tokens)."""
    shapes: list[tuple[int, int]] = []
    plain = type(model.trunk).forward

    def spied(trunk: object, *args: object, **kwargs: torch.Tensor) -> object:
        shapes.append((kwargs["input_ids"].shape[0], kwargs["input_ids"].shape[1]))
        return plain(trunk, *args, **kwargs)

    monkeypatch.setattr(type(model.trunk), "forward", spied)
    return shapes


def test_rows_that_have_finished_leave_at_once_and_the_others_go_on_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_adapters("llama", "sft")
    drawn = uniforms(ends={2: 0, 7: 0, 4: 1, 0: 2})
    alone = respond(model, PROMPTS, drawn, batch_size=1)
    shapes = watched_rows(model, monkeypatch)
    responses = respond(model, PROMPTS, drawn)
    assert shapes == [(1, 36), (6, 1), (5, 1), (4, 1), (4, 1), (4, 1)]
    assert [len(response.ids) for response in responses] == [3, 6, 1, 6, 2, 6, 6, 1]
    assert [response.ids for response in responses] == [response.ids for response in alone]
    shapes.clear()
    respond(model, PROMPTS, uniforms(ends=dict.fromkeys(range(8), 1)))
    assert shapes == [(1, 36), (8, 1)]  # and when all have finished, nothing is computed any more


def test_waiting_prompts_take_the_places_of_rows_that_have_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_adapters("llama", "sft")
    drawn = uniforms(ends={0: 0, 1: 2, 2: 1})
    shapes = watched_rows(model, monkeypatch)
    responses = respond(model, PROMPTS[:5], drawn[:5], batch_size=2)
    # Two enter, the first ends at once; the third enters beside the second, and so on: never more than two decode
    assert shapes[:4] == [(1, 3), (1, 3), (2, 1), (1, 4)]
    assert max(rows for rows, tokens in shapes if tokens == 1) == 2
    assert sum(rows * tokens for rows, tokens in shapes) < 5 * (5 + 6)
    assert [r.ids for r in responses] == [r.ids for r in respond(model, PROMPTS[:5], drawn[:5], batch_size=1)]


@pytest.mark.parametrize("shape", SHAPES)
def test_many_refills_move_the_window_of_the_cache_back_and_change_no_response(shape: str) -> None:
    model = with_adapters(shape, "sft")
    prompts = [PROMPTS[n % 8] for n in range(24)]
    drawn = uniforms(24, ends={n: n % 7 for n in range(24) if n % 7 < 6})
    with model.role("sft"):
        sampling = replace(SAMPLING, batch_size=3)
        slots = generate(model, model.base.codec(None), prompts, sampling=sampling, uniforms_BT=drawn)
    alone = respond(model, prompts, drawn, batch_size=1)
    assert [(r.ids, r.has_eos) for r in slots] == [(r.ids, r.has_eos) for r in alone]
    for one, other in zip(slots, alone, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_a_prompt_is_prefilled_once_for_its_responses(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_adapters("llama", "sft")
    prompts = [prompt for prompt in PROMPTS[4:6] for _ in range(4)]
    alone = respond(model, prompts, uniforms(), batch_size=1)
    shapes = watched_rows(model, monkeypatch)
    together = respond(model, prompts, uniforms())
    assert shapes[:2] == [(2, 6), (8, 1)]
    assert [r.ids for r in together] == [r.ids for r in alone]
    assert len({r.ids for r in together}) == 8


def test_long_prompts_enter_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_adapters("llama", "sft")
    monkeypatch.setattr(align.generation, "_ENTERING_TOKENS", 12)
    alone = respond(model, PROMPTS, uniforms(), batch_size=1)
    shapes = watched_rows(model, monkeypatch)
    together = respond(model, PROMPTS, uniforms())
    assert shapes[:6] == [(1, 6), (2, 5), (1, 6), (1, 7), (1, 8), (8, 1)]
    assert [r.ids for r in together] == [r.ids for r in alone]


def test_a_sliding_window_holds_for_rows_that_enter_later(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_adapters("qwen2", "sft")
    config = model.base.model.config
    alone_without = respond(model, PROMPTS, uniforms(), batch_size=1)
    monkeypatch.setattr(config, "sliding_window", 3)
    monkeypatch.setattr(config, "layer_types", ["sliding_attention"] * config.num_hidden_layers)
    monkeypatch.setattr(model.trunk, "has_sliding_layers", True, raising=False)
    for layer in cast(nn.ModuleList, model.trunk.layers):
        monkeypatch.setattr(layer.self_attn, "layer_type", "sliding_attention", raising=False)
        monkeypatch.setattr(layer.self_attn, "sliding_window", 3, raising=False)
        monkeypatch.setattr(layer, "attention_type", "sliding_attention", raising=False)
    responses = respond(model, PROMPTS, uniforms(ends={0: 0, 2: 1}), batch_size=3)
    assert [r.ids for r in responses[3:]] != [r.ids for r in alone_without[3:]]
    with model.role("sft"):
        for prompt, response in zip(PROMPTS, responses, strict=True):
            logprobs_SV = logits_of(model, prompt + response.ids).log_softmax(-1)
            expected = [logprobs_SV[len(prompt) + t - 1, token].item() for t, token in enumerate(response.ids)]
            assert response.logprobs == pytest.approx(expected, abs=1e-4)


def test_generation_follows_the_present_role_and_leaves_no_gradients() -> None:
    model = with_adapters("llama", "reward", "sft")
    codec, drawn = model.base.codec(None), uniforms()
    with model.role("reward"):
        others = generate(model, codec, PROMPTS, sampling=SAMPLING, uniforms_BT=drawn)
    own = respond(model, PROMPTS, drawn)
    assert [r.logprobs for r in own] != [r.logprobs for r in others]


def test_progress_is_told_in_responses() -> None:
    model = with_adapters("llama", "sft")
    told: list[tuple[int, int]] = []
    with model.role("sft"):
        generate(
            model,
            model.base.codec(None),
            PROMPTS,
            sampling=replace(SAMPLING, batch_size=3, max_response_length=1),
            uniforms_BT=uniforms(),
            on_progress=lambda done, total: told.append((done, total)),
        )
    assert told == [(0, 8), (3, 8), (6, 8), (8, 8)]


# ---- sampling one token ----


def draw(
    logits_V: Tensor, uniforms_N: Tensor, *, eos: Tensor = NO_EOS, step: int = 0, **changes: float
) -> tuple[Tensor, Tensor]:
    logits_NV, sampling = logits_V.expand(len(uniforms_N), -1), replace(SAMPLING, **changes)
    is_early_N = torch.full((len(uniforms_N),), step < sampling.min_response_length)
    return sample(logits_NV, uniforms_N.double(), sampling, eos=eos, is_early_B=is_early_N)


def evenly(count: int) -> Tensor:
    """Uniforms in the middle of `count` equal parts: each token is then drawn as often as its probability says, ±1."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def shares(tokens_N: Tensor, size: int) -> list[float]:
    return (tokens_N.bincount(minlength=size) / len(tokens_N)).tolist()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_tokens_are_drawn_as_often_as_the_softmax_at_the_temperature_says(temperature: float) -> None:
    logits_V = torch.tensor([0.3, -1.2, 2.0, 0.0, 1.1])
    tokens_N, logprobs_N = draw(logits_V, evenly(10_000), temperature=temperature)
    expected_V = (logits_V / temperature).log_softmax(-1)
    assert shares(tokens_N, 5) == pytest.approx(expected_V.exp().tolist(), abs=2e-4)
    torch.testing.assert_close(logprobs_N, expected_V[tokens_N])


def test_keyed_uniforms_draw_tokens_with_the_right_frequencies() -> None:
    probabilities_V = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05])
    count = 20_000
    drawn = torch.from_numpy(keyed_uniforms(7, "sample", 3, list(range(count // 10)), 10).reshape(-1))
    observed_V = draw(probabilities_V.log(), drawn)[0].bincount(minlength=5)
    expected_V = count * probabilities_V
    chi_square = ((observed_V - expected_V).square() / expected_V).sum().item()
    assert chi_square < 18.47  # the 99.9 % quantile with 4 degrees of freedom


def test_a_token_of_probability_0_is_never_drawn() -> None:
    logits_V = torch.tensor([-torch.inf, 0.0, -torch.inf, 1.0, -torch.inf])
    extremes = torch.tensor([0.0, 2**-53, LAST_TOKEN], dtype=torch.float64)
    assert draw(logits_V, extremes)[0].tolist() == [1, 1, 3]
    assert set(draw(logits_V, evenly(1000))[0].tolist()) == {1, 3}


@pytest.mark.parametrize("size", [1, 255, 256, 257, 700])
def test_the_inverse_cdf_by_blocks_is_the_plain_one_over_the_whole_vocabulary(size: int) -> None:
    logits_V = 3 * torch.randn(size, generator=torch.Generator().manual_seed(size))
    uniforms_N = torch.cat([evenly(5000), torch.tensor([0.0, LAST_TOKEN], dtype=torch.float64)])
    cdf_V = logits_V.softmax(-1).double().cumsum(-1)
    expected_N = torch.searchsorted(cdf_V, uniforms_N * cdf_V[-1], right=True).clamp(max=size - 1)
    assert torch.equal(draw(logits_V, uniforms_N)[0], expected_N)


def test_rare_tokens_after_a_likely_one_can_be_drawn() -> None:
    # 1,000 tokens of probability 10⁻⁸ each: a float32 sum near 1 moves in steps of 6·10⁻⁸ and would jump over them
    logits_V = torch.tensor([0.0] + [1e-8] * 1000).log()
    logits_V[0] = 0.0
    cdf_V = logits_V.softmax(-1).double().cumsum(-1)
    middles = (cdf_V[:-1] + cdf_V[1:]) / 2 / cdf_V[-1]
    tokens_N, _ = draw(logits_V, middles)
    assert tokens_N.tolist() == list(range(1, 1001))


def test_top_k_keeps_the_k_likeliest_in_proportion_but_logprobs_are_of_the_whole_softmax() -> None:
    probabilities_V = torch.tensor([0.1, 0.4, 0.2, 0.3])
    tokens_N, logprobs_N = draw(probabilities_V.log(), evenly(7000), top_k=2)
    assert shares(tokens_N, 4) == pytest.approx([0, 4 / 7, 0, 3 / 7], abs=2e-4)
    torch.testing.assert_close(logprobs_N.exp(), probabilities_V[tokens_N])


@pytest.mark.parametrize(("top_p", "kept"), [(0.01, {1}), (0.5, {1, 3}), (0.85, {1, 2, 3}), (0.95, {0, 1, 2, 3})])
def test_top_p_keeps_the_smallest_set_that_reaches_p(top_p: float, kept: set[int]) -> None:
    probabilities_V = torch.tensor([0.1, 0.4, 0.2, 0.3])
    tokens_N, logprobs_N = draw(probabilities_V.log(), evenly(1000), top_p=top_p)
    assert set(tokens_N.tolist()) == kept
    torch.testing.assert_close(logprobs_N.exp(), probabilities_V[tokens_N])


def test_top_k_and_top_p_together_keep_what_both_keep() -> None:
    probabilities_V = torch.tensor([0.1, 0.4, 0.2, 0.3])
    assert set(draw(probabilities_V.log(), evenly(1000), top_p=0.85, top_k=2)[0].tolist()) == {1, 3}
    assert set(draw(probabilities_V.log(), evenly(1000), top_p=0.3, top_k=3)[0].tolist()) == {1}


def test_eos_is_withheld_before_the_minimum_length_and_no_longer() -> None:
    probabilities_V, eos = torch.tensor([0.1, 0.4, 0.2, 0.3]), torch.tensor([1, 3])
    tokens_N, logprobs_N = draw(probabilities_V.log(), evenly(3000), eos=eos, step=1, min_response_length=2)
    assert shares(tokens_N, 4) == pytest.approx([1 / 3, 0, 2 / 3, 0], abs=5e-4)
    torch.testing.assert_close(logprobs_N.exp(), probabilities_V[tokens_N])
    tokens_N, _ = draw(probabilities_V.log(), evenly(3000), eos=eos, step=2, min_response_length=2)
    assert shares(tokens_N, 4) == pytest.approx(probabilities_V.tolist(), abs=5e-4)


def test_bfloat16_logits_are_sampled_in_float32() -> None:
    tokens_N, logprobs_N = draw(torch.zeros(1000).bfloat16(), evenly(1000))
    assert tokens_N.tolist() == list(range(1000))
    assert logprobs_N.dtype == torch.float32


def test_rows_of_different_lengths_that_move_into_gaps_at_once_go_on_unchanged() -> None:
    model = with_adapters("llama", "sft")
    drawn = uniforms(ends={0: 1, 1: 1, 2: 1})  # three gaps: rows of six to eight tokens move into them
    for one, other in zip(respond(model, PROMPTS, drawn), respond(model, PROMPTS, drawn, batch_size=1), strict=True):
        assert one.ids == other.ids
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_a_response_may_end_with_the_first_token_past_its_minimum_length() -> None:
    model = with_adapters("llama", "sft")
    drawn = uniforms(3, ends={0: 1, 1: 2, 2: 3})
    responses = respond(model, PROMPTS[:3], drawn, min_response_length=2)
    assert not responses[0].has_eos or len(responses[0].ids) > 2
    assert [(len(r.ids), r.has_eos) for r in responses[1:]] == [(3, True), (4, True)]


def test_after_the_window_has_moved_back_there_is_room_for_the_longest_prompt() -> None:
    # One slot of 8 + 2·2 columns: the window moves back for the fifth short prompt, and the longest comes behind it
    model = with_adapters("llama", "sft")
    prompts = [(n,) for n in range(5)] + [PROMPTS[7]]
    drawn = uniforms(6, length=2)
    refilled = respond(model, prompts, drawn, batch_size=1, max_response_length=2)
    assert refilled == respond(model, prompts, drawn, batch_size=1, max_response_length=2)
    together = respond(model, prompts, drawn, batch_size=8, max_response_length=2)
    assert [r.ids for r in refilled] == [r.ids for r in together]


def test_columns_that_no_row_has_written_hold_zeros() -> None:
    # a masked NaN would come through: 0 · NaN
    model = with_adapters("llama", "sft")
    slots = Slots(model, size=3, max_prompt=4, max_response=5, is_refilled=True)
    torch.use_deterministic_algorithms(True)  # which fills memory that nobody has written with NaN
    try:
        with torch.no_grad(), model.role("sft"):
            slots.enter([(1, 2), (3, 4, 5)], pad_id=0)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(tensor.isfinite().all() for tensor in slots._tensors)  # pyright: ignore[reportPrivateUsage]


def test_top_p_is_of_what_may_be_drawn() -> None:
    # EOS (0.4) is withheld: of the rest 0.3 is half, which reaches 0.45 alone
    probabilities_V, eos = torch.tensor([0.1, 0.4, 0.2, 0.3]), torch.tensor([1])
    tokens_N, _ = draw(probabilities_V.log(), evenly(1000), eos=eos, min_response_length=1, top_p=0.45)
    assert set(tokens_N.tolist()) == {3}
