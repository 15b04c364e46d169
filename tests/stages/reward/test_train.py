from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CohereConfig, GraniteConfig, PreTrainedConfig

import stages.reward.trainer
from align.adapters import AdaptedModel
from align.artifacts import Artifact, write_directory
from align.config import RewardConfig
from align.context import RewardInputs, StageResult
from align.episodes import Episode, collate, score_pass
from align.errors import DataError, InvariantError
from align.generation import generate
from align.heads import ScalarHead, load_head
from align.lora import decoder_layers
from align.randomness import keyed_uniforms
from align.restore import ModelState, lent, snapshot
from data.records import Account, Message
from data.tokenization import encode_prompt
from stages.reward.batches import batch_scores
from stages.reward.scorer import Scorer
from stages.reward.train import run_reward, statistics_of
from stages.reward.trainer import ScoreTrainer
from tests.align.test_architectures import loaded
from tests.resident import SHAPES, drawn_episodes, logits_of, resident, with_adapters
from tests.stages.reward.classifiers import classifier_on_trunk
from tests.stages.scenes import SAMPLING, comparisons, context_of, hashes_of, metrics_of

SMALL: dict[str, object] = {"batch_size": 4, "micro_batch_size": 2, "max_length": 200, "learning_rate": 5e-3}
CPU = torch.device("cpu")


def sft_made_by_hand(root: Path, shape: str) -> Artifact:
    made = with_adapters(shape, "sft")
    return write_directory(
        root / "made",
        lambda path: made.save("sft", path),
        kind="adapter",
        stage="sft",
        step=1,
        base_identity=made.base_identity,
    )


def run(
    model: AdaptedModel, root: Path, *, seed: int = 0, inputs: RewardInputs | None = None, **settings: Any
) -> StageResult:
    inputs = inputs or RewardInputs(None, comparisons(8), comparisons(6, start=50), SAMPLING)
    return run_reward(
        RewardConfig.model_validate({**SMALL, **settings}), inputs, context_of(model, root, "reward", seed=seed)
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_separable_pairs_are_learnt_and_only_the_reward_adapter_and_its_head_change(shape: str, tmp_path: Path) -> None:
    sft = sft_made_by_hand(tmp_path, shape)
    model = resident(shape)
    base = model.base_checksum()
    inputs = RewardInputs(sft, comparisons(8, start=10), comparisons(6, start=50), SAMPLING)
    # With GPT-2's own dropout the margin is anything from 0.1 to 4, by the seed
    result = run(model, tmp_path, seed=2, inputs=inputs, epochs=12, learning_rate=1e-2)
    assert result.metrics["accuracy"] == 1
    assert result.metrics["margin"] > 0.5  # type: ignore[operator]
    assert result.metrics["loss"] < 0.6  # type: ignore[operator]
    assert result.metrics["held_out_pairs"] == 6
    assert result.metrics["steps"] == 24
    assert model.base_checksum() == base
    model.load("as it was", sft.path)
    assert model.checksum("sft") == model.checksum("as it was") != model.checksum("reward")
    moved = [
        not torch.equal(own, before)
        for own, before in zip(model.tensors("reward").values(), model.tensors("sft").values(), strict=True)
    ]
    assert all(moved)
    head, _ = load_head(result.artifact("head").path, device=CPU)
    seed = context_of(model, tmp_path / "other", "reward").seed
    assert not torch.equal(head.weight, ScalarHead(model.hidden_size).initialize(seed).weight)
    # and what is on disk is what was measured
    model.load("from disk", result.artifact("adapter").path)
    assert model.checksum("from disk") == model.checksum("reward")


def test_the_accuracy_of_the_length_rule_takes_its_direction_from_the_train_set(tmp_path: Path) -> None:
    # "good n" is longer than "bad n": in training the longer wins, so of pairs turned round none is right
    turned = comparisons(6, chosen="bad", rejected="good", start=50)
    result = run(resident(), tmp_path, inputs=RewardInputs(None, comparisons(4), turned, SAMPLING), epochs=1)
    assert result.metrics["length_baseline_accuracy"] == 0
    result = run(resident(), tmp_path, inputs=RewardInputs(None, turned, turned, SAMPLING), epochs=1)
    assert result.metrics["length_baseline_accuracy"] == 1


def test_the_logged_loss_is_the_bradley_terry_loss_of_the_pairs(tmp_path: Path) -> None:
    # All pairs in one batch: the loss of step 1 is that of the head as it was drawn, on adapters that change nothing
    model = resident()
    whole: dict[str, Any] = {"batch_size": 8, "micro_batch_size": 8, "objective": {"centering": 0.0}}
    run(model, tmp_path, **whole, epochs=1)
    logged = metrics_of(tmp_path / "reward")[0]["reward/loss"]
    model.reset()
    inputs = RewardInputs(None, comparisons(8), comparisons(8), SAMPLING)
    measured = run(model, tmp_path, inputs=inputs, **whole, learning_rate=1e-9)
    assert logged == pytest.approx(measured.metrics["loss"], abs=1e-4)


@pytest.mark.parametrize("scores", [[0.3], [0.3, 0.3, 0.3]])
def test_scores_without_a_spread_keep_their_own_scale(scores: list[float], caplog: pytest.LogCaptureFixture) -> None:
    found = statistics_of(torch.tensor(scores))
    assert (found.mean, found.std) == (pytest.approx(0.3), 1.0)
    assert f"the scores of {len(scores)} SFT answers have no spread" in caplog.text


def test_the_scores_scale_on_sft_answers_is_saved_with_the_head(tmp_path: Path) -> None:
    sft = sft_made_by_hand(tmp_path, "llama")
    model = resident()
    held_out = comparisons(5, start=50)
    # A prompt that stands in two pairs is asked once
    inputs = RewardInputs(sft, comparisons(8), (*held_out, *held_out[:2]), SAMPLING)
    result = run(model, tmp_path, inputs=inputs)
    head, statistics = load_head(result.artifact("head").path, device=CPU)
    assert statistics is not None
    codec = model.base.codec(None)
    prompts = [tuple(encode_prompt(codec, pair.prompt)) for pair in held_out]
    seed = context_of(model, tmp_path / "other", "reward").seed
    uniforms = keyed_uniforms(seed, "statistics", 0, list(range(5)), SAMPLING.max_response_length)
    scores: list[float] = []
    for row, prompt in enumerate(prompts):
        with model.role("sft"):
            [response] = generate(model, codec, [prompt], sampling=SAMPLING, uniforms_BT=uniforms[row : row + 1])
        batch = collate([Episode(prompt, response.ids, response.has_eos)], pad_id=codec.pad_id, device=CPU)
        with torch.no_grad(), model.role("reward"):
            scores.append(score_pass(model, head, batch).item())
    expected = torch.tensor(scores)
    assert statistics.num_responses == 5
    assert statistics.mean == pytest.approx(expected.mean().item(), abs=1e-5)
    assert statistics.std == pytest.approx(expected.std(unbiased=False).item(), abs=1e-5)
    assert (result.metrics["score_mean"], result.metrics["score_std"]) == (statistics.mean, statistics.std)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_trainer_and_ppo_read_the_same_score(shape: str) -> None:
    # rows of several lengths, pad chosen by the codec; right-padded, as TRL's collator does
    model = with_adapters(shape, "sft", "reward")
    codec, head = model.base.codec(None), ScalarHead(model.hidden_size).initialize(0)
    batch = collate(drawn_episodes([(3, 4), (1, 1), (2, 7)], end=codec.end_of_turn_id), pad_id=codec.pad_id, device=CPU)
    with torch.no_grad(), model.role("reward"):
        rows = {"input_ids": batch.ids_BS, "attention_mask": batch.is_token_BS.long()}
        theirs_B = classifier_on_trunk(model, head, pad_id=codec.pad_id)(**rows).logits[:, 0]
        torch.testing.assert_close(theirs_B, score_pass(model, head, batch))
        torch.testing.assert_close(batch_scores(model, head, rows), theirs_B)


def test_the_scorer_is_no_second_copy_of_the_base() -> None:
    model = with_adapters("llama", "sft")
    head = ScalarHead(model.hidden_size)
    scorer = Scorer(model, head)
    own = {id(parameter) for parameter in (*model.base.model.parameters(), *head.parameters())}
    assert {id(parameter) for parameter in scorer.parameters()} <= own
    assert model.base.model.config.pad_token_id == 258  # the base's own config is not touched


@pytest.mark.parametrize("kind", [CohereConfig, GraniteConfig])
def test_a_base_of_which_transformers_has_no_classifier_is_trained_like_any(
    kind: Callable[..., PreTrainedConfig], tmp_path: Path
) -> None:
    config = kind(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    model = loaded(config, tmp_path / "base")
    result = run(model, tmp_path, epochs=12, learning_rate=1e-2)
    assert result.metrics["accuracy"] == 1
    assert model.checksum("reward") != model.checksum("sft")


@pytest.mark.parametrize("shape", SHAPES)
def test_with_gradient_checkpointing_the_same_is_learnt(shape: str, tmp_path: Path) -> None:
    results: list[StageResult] = []
    calls = [0, 0]  # of the first layer: once more for each backward pass
    for is_checkpointed in (False, True):
        model = resident(shape, dropout=0.0)
        for module in model.base.model.modules():  # GPT-2's own
            if isinstance(module, nn.Dropout):
                module.p = 0.0

        def count(*_: object, number: int = int(is_checkpointed)) -> None:
            calls[number] += 1

        decoder_layers(model.base.model)[1][0].register_forward_pre_hook(count)
        results.append(run(model, tmp_path / str(is_checkpointed), gradient_checkpointing=is_checkpointed))
    assert calls[1] == calls[0] + 4  # micro-batches of an epoch
    assert results[0].metrics["margin"] == pytest.approx(results[1].metrics["margin"], rel=1e-4)
    assert results[0].metrics["loss"] == pytest.approx(results[1].metrics["loss"], rel=1e-4)


def test_a_row_that_the_trainer_drops_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Dropping(ScoreTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.train_dataset = self.train_dataset.select(range(len(self.train_dataset) - 2))

    monkeypatch.setattr(stages.reward.trainer, "ScoreTrainer", Dropping)
    with pytest.raises(InvariantError, match="TRL's trainer kept 6 of 8 rows"):
        run(resident(), tmp_path)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_base_is_left_as_it_was_found_dropout_included(
    shape: str, checkpointing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states: list[ModelState] = []

    @contextmanager
    def watched(lent_model: nn.Module) -> Generator[None]:
        states.append(snapshot(lent_model))
        with lent(lent_model):
            yield
        states.append(snapshot(lent_model))

    monkeypatch.setattr(stages.reward.trainer, "lent", watched)
    model = resident(shape, dropout=0.1)
    bare, checksum = snapshot(model.base.model), model.base_checksum()
    run(model, tmp_path, gradient_checkpointing=checkpointing)
    before, after = states
    assert after == before
    lora = [m for path, m in model.base.model.named_modules() if "lora_dropout." in path]
    assert lora
    assert all(isinstance(module, nn.Dropout) and module.p == 0.1 and not module.training for module in lora)
    assert model.base_checksum() == checksum
    model.reset()
    assert snapshot(model.base.model) == bare


def test_dropout_applies_while_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[tuple[float, bool]] = set()

    class Watched(ScoreTrainer):
        def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
            dropouts = [m for path, m in model.named_modules() if "lora_dropout.reward" in path]
            seen.update((m.p, m.training) for m in dropouts if isinstance(m, nn.Dropout))
            return super().compute_loss(model, *args, **kwargs)

    monkeypatch.setattr(stages.reward.trainer, "ScoreTrainer", Watched)
    run(resident(dropout=0.25), tmp_path)
    assert seen == {(0.25, True)}


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        torch.manual_seed(len(name))
        run(resident(dropout=0.1), tmp_path / name, seed=seed)
    one, same, other = (hashes_of(tmp_path / name / "reward") for name in ("one", "same", "other"))
    assert {"adapter/adapter_model.safetensors", "head/head.safetensors", "metrics.jsonl"} <= one.keys()
    assert one == same
    assert one["adapter/adapter_model.safetensors"] != other["adapter/adapter_model.safetensors"]


def test_a_brought_adapter_is_where_training_starts(tmp_path: Path) -> None:
    brought = sft_made_by_hand(tmp_path, "llama")
    model = resident()
    inputs = RewardInputs(None, comparisons(4), comparisons(4), SAMPLING, adapter=brought)
    run(model, tmp_path, inputs=inputs, learning_rate=1e-9)
    model.load("brought", brought.path)
    ids = list(range(9))
    with model.role("brought"):
        expected = logits_of(model, ids)
    with model.role("reward"):
        torch.testing.assert_close(logits_of(model, ids), expected)


def test_pairs_that_lose_their_beginning_are_counted_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    long = tuple(replace(pair, prompt=(Message("user", "long " * 50),)) for pair in comparisons(2, start=90))
    inputs = RewardInputs(None, (*comparisons(6), *long), comparisons(6, start=50), SAMPLING)
    result = run(resident("llama"), tmp_path, inputs=inputs)
    assert result.account == Account(14, 14, (), cut=2)
    assert "reward: train: 2 of 8 rows are longer than reward.max_length 200 and lose their beginning" in caplog.text


def test_prompts_too_long_to_be_answered_are_told_and_none_that_fits_is_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = comparisons(6, start=7)  # q7 to q12: two lengths
    lengths = sorted({len(encode_prompt(resident("llama").base.codec(None), p.prompt)) for p in pairs})
    some = replace(SAMPLING, max_prompt_length=lengths[-1] - 1)
    result = run(resident("llama"), tmp_path, inputs=RewardInputs(None, comparisons(8), pairs, some))
    assert "held-out prompts, which are over ppo.rollout.max_prompt_length" in caplog.text
    assert 0 < result.metrics["score_responses"] < 6  # type: ignore[operator]
    none = replace(SAMPLING, max_prompt_length=1)
    monkeypatch.setattr("stages.reward.train.Members", lambda *_: pytest.fail("it was told only after training"))
    with pytest.raises(DataError, match="none of the 6 held-out prompts fits"):
        run(resident("llama"), tmp_path, inputs=RewardInputs(None, comparisons(8), pairs, none))
