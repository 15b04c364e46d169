from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from trl.trainer.sft_trainer import SFTTrainer

import stages.sft.train
from align.adapters import AdaptedModel
from align.config import SFTConfig
from align.context import SFTInputs, StageResult
from align.errors import DataError, InvariantError
from align.generation import generate
from align.randomness import keyed_uniforms
from align.restore import ModelState, lent, snapshot
from data.records import Account, Demonstration, Message
from data.tokenization import decode_response, encode_demonstrations, encode_prompt
from stages.sft.train import held_out_nll, run_sft
from stages.sft.trainer import NLLTrainer
from tests.resident import SHAPES, logits_of, resident, with_adapters
from tests.stages.scenes import SAMPLING, asked, context_of, demonstrations, hashes_of, metrics_of

SMALL: dict[str, object] = {"batch_size": 4, "micro_batch_size": 2, "max_length": 200}


def run(
    model: AdaptedModel, root: Path, *, seed: int = 0, inputs: SFTInputs | None = None, **settings: object
) -> StageResult:
    inputs = inputs or SFTInputs(demonstrations(8), demonstrations(4))
    return run_sft(SFTConfig.model_validate({**SMALL, **settings}), inputs, context_of(model, root, "sft", seed=seed))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_repeated_answer_is_learnt_with_its_end(shape: str, tmp_path: Path) -> None:
    model = resident(shape)
    found = run(model, tmp_path, epochs=40, micro_batch_size=4, learning_rate=2e-2).metrics
    assert isinstance(found["nll_before"], float)
    assert isinstance(found["nll_after"], float)
    assert found["nll_before"] > 4  # random weights know nothing
    assert found["nll_after"] < (0.6 if shape == "llama" else 1.2)  # narrower logits: see align.tiny
    assert found["steps"] == 80
    codec = model.base.codec(None)
    prompts = [tuple(encode_prompt(codec, asked(f"q{i}"))) for i in range(4)]
    uniforms = 0.3 + 0.4 * keyed_uniforms(0, "test", 0, list(range(4)), SAMPLING.max_response_length)
    with model.role("sft"):
        responses = generate(model, codec, prompts, sampling=replace(SAMPLING, temperature=0.2), uniforms_BT=uniforms)
    assert [decode_response(codec, response.ids) for response in responses] == ["yes"] * 4
    assert all(response.has_eos for response in responses)


def test_the_loss_that_is_logged_is_the_nll_that_is_measured(tmp_path: Path) -> None:
    # The first step's loss is of the untrained adapter on rows whose answers all have the same tokens
    found = run(resident(), tmp_path, epochs=1, learning_rate=1e-9)
    lines = metrics_of(tmp_path / "sft")
    assert [line["step"] for line in lines] == [1, 2]
    assert sum(line["sft/loss"] for line in lines) / 2 == pytest.approx(found.metrics["nll_before"], rel=1e-2)


def test_only_the_assistants_tokens_and_ends_of_turn_are_learnt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = resident("llama")
    batches: list[dict[str, torch.Tensor]] = []

    class Watched(NLLTrainer):
        def train(self, *args: Any, **kwargs: Any) -> Any:
            batches.extend(self.get_train_dataloader())
            return super().train(*args, **kwargs)

    monkeypatch.setattr(stages.sft.train, "NLLTrainer", Watched)
    turns = (Message("system", "Be kind."), *asked("Hello?"), Message("assistant", "Hi!"), *asked("And?"))
    two = Demonstration((*turns, Message("assistant", "That is all.")), "test:1")
    run(model, tmp_path, inputs=SFTInputs((two, *demonstrations(1)), demonstrations(1)))
    rows = [
        (ids[mask.bool()], labels[mask.bool()])
        for batch in batches
        for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True)
    ]
    decode = model.base.tokenizer.decode
    ids, labels = max(rows, key=lambda row: len(row[0]))
    assert decode(ids) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHello?<|im_end|>\n"
        "<|im_start|>assistant\nHi!<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n"
        "<|im_start|>assistant\nThat is all.<|im_end|>"
    )
    assert decode(labels[labels != -100]) == "Hi!<|im_end|>That is all.<|im_end|>"
    assert torch.equal(labels[labels != -100], ids[labels != -100])
    for batch in batches:  # and nothing at padding, though pad is EOS in this tokenizer
        assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()


class TRLs(SFTTrainer):
    """TRL's own loss, through every position of whole rows."""

    def __init__(self, *args: Any, resident: AdaptedModel, **kwargs: Any) -> None:
        super().__init__(*args, model=resident.peft, **kwargs)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_is_that_of_trl(
    shape: str, checkpointing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ragged = tuple(row for n in (1, 3, 9, 4) for row in demonstrations(2, "so " * n))
    ours, theirs = resident(shape), resident(shape)
    inputs = SFTInputs(ragged, demonstrations(2))
    run(ours, tmp_path / "ours", inputs=inputs, gradient_checkpointing=checkpointing)
    monkeypatch.setattr(stages.sft.train, "NLLTrainer", TRLs)
    run(theirs, tmp_path / "theirs", inputs=inputs, gradient_checkpointing=checkpointing)
    for our, their in zip(metrics_of(tmp_path / "ours" / "sft"), metrics_of(tmp_path / "theirs" / "sft"), strict=True):
        for key in ("sft/loss", "sft/grad_norm", "sft/learning_rate", "sft/num_tokens"):
            assert our[key] == pytest.approx(their[key], rel=1e-4), key
    for name, tensor in ours.tensors("sft").items():
        torch.testing.assert_close(tensor, theirs.tensors("sft")[name], rtol=1e-4, atol=1e-6)


def test_a_row_that_the_trainer_drops_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Dropping(NLLTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.train_dataset = self.train_dataset.select(range(len(self.train_dataset) - 1))

    monkeypatch.setattr(stages.sft.train, "NLLTrainer", Dropping)
    with pytest.raises(InvariantError, match="TRL's trainer kept 7 of 8 rows"):
        run(resident(), tmp_path)


def test_rows_that_are_too_long_are_set_aside_and_counted(tmp_path: Path) -> None:
    inputs = SFTInputs((*demonstrations(3), *demonstrations(1, "long " * 50)), demonstrations(2))
    context = context_of(resident(), tmp_path, "sft", max_reject_rate=0.5)
    result = run_sft(SFTConfig.model_validate({**SMALL, "max_length": 100}), inputs, context)
    assert result.account is not None
    assert (result.account.rows_in, result.account.kept) == (6, 5)
    assert result.account.rejected == (("response over length", 1),)
    assert "response over length" in (tmp_path / "sft" / "rejects-train-tokens.jsonl").read_text()
    with pytest.raises(DataError):
        run_sft(SFTConfig.model_validate({**SMALL, "max_length": 100}), inputs, context_of(resident(), tmp_path, "sft"))


def test_rows_that_lose_their_beginning_are_counted_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    inputs = SFTInputs((*demonstrations(3), *demonstrations(1, "long " * 18)), demonstrations(2))
    result = run(resident(), tmp_path, inputs=inputs, max_length=100)
    assert result.account == Account(6, 6, (), cut=1)
    assert "sft: train: 1 of 4 rows are longer than sft.max_length 100 and lose their beginning" in caplog.text
    assert "held_out: " not in caplog.text


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_base_is_left_as_it_was_found(
    shape: str, checkpointing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states: list[ModelState] = []

    @contextmanager
    def watched(lent_model: torch.nn.Module) -> Generator[None]:
        states.append(snapshot(lent_model))
        with lent(lent_model):
            yield
        states.append(snapshot(lent_model))

    monkeypatch.setattr(stages.sft.train, "lent", watched)
    model = resident(shape, dropout=0.1)
    bare, checksum = snapshot(model.base.model), model.base_checksum()
    run(model, tmp_path, gradient_checkpointing=checkpointing)
    before, after = states
    assert after == before
    assert model.base_checksum() == checksum
    model.reset()
    assert snapshot(model.base.model) == bare


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        torch.manual_seed(len(name))  # whatever the global state is
        run(resident(dropout=0.1), tmp_path / name, seed=seed)
    one, same, other = (hashes_of(tmp_path / name / "sft") for name in ("one", "same", "other"))
    assert "adapter/adapter_model.safetensors" in one
    assert "metrics.jsonl" in one
    assert one == same
    assert one["adapter/adapter_model.safetensors"] != other["adapter/adapter_model.safetensors"]


def test_checkpointing_changes_memory_not_the_result(tmp_path: Path) -> None:
    tensors: list[dict[str, torch.Tensor]] = []
    for checkpointing in (False, True):
        model = resident()
        run(model, tmp_path, gradient_checkpointing=checkpointing, learning_rate=1e-3)
        tensors.append({name: tensor.detach().clone() for name, tensor in model.tensors("sft").items()})
    for name, tensor in tensors[0].items():
        torch.testing.assert_close(tensors[1][name], tensor)


def test_a_brought_adapter_is_where_training_starts(tmp_path: Path) -> None:
    first = run(resident(), tmp_path / "first", epochs=20, learning_rate=2e-2)
    inputs = SFTInputs(demonstrations(8), demonstrations(4), adapter=first.artifact("adapter"))
    second = run(resident(), tmp_path / "second", inputs=inputs, learning_rate=1e-4)
    assert second.metrics["nll_before"] == pytest.approx(first.metrics["nll_after"], abs=1e-5)


def held_out_by_a_plain_loop(model: AdaptedModel, records: tuple[Demonstration, ...], max_length: int) -> float:
    rows, _ = encode_demonstrations(model.base.codec(None), records, max_length=max_length)
    logprobs: list[float] = []
    with model.role("sft"):
        for row in rows:
            logprobs_SV = logits_of(model, row.ids).log_softmax(-1)
            for at in range(1, len(row.ids)):  # nothing predicts a first token
                if row.is_response[at]:
                    logprobs.append(logprobs_SV[at - 1, row.ids[at]].item())
    return -sum(logprobs) / len(logprobs)


MEASURED: dict[str, Callable[[], tuple[tuple[Demonstration, ...], int]]] = {
    "ragged rows": lambda: (tuple(d for n in (1, 3, 9) for d in demonstrations(2, "so " * n)), 200),
    # over length, so cut from the left: the first id that is left stands inside the first answer
    "cut inside an answer": lambda: (
        (
            Demonstration(
                (*asked("a"), Message("assistant", "b" * 60), *asked("c"), Message("assistant", "d")), "test:1"
            ),
        ),
        64,
    ),
}


@pytest.mark.parametrize("case", MEASURED)
def test_the_held_out_nll_is_a_mean_over_learnt_tokens(case: str) -> None:
    records, max_length = MEASURED[case]()
    model = with_adapters("llama", "sft")
    rows, _ = encode_demonstrations(model.base.codec(None), records, max_length=max_length)
    assert rows[0].is_response[0] == (case == "cut inside an answer")
    found = held_out_nll(model, rows, batch_size=4, pad_id=0)
    assert found == pytest.approx(held_out_by_a_plain_loop(model, records, max_length), abs=1e-5)
