import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from align.errors import ConfigError, ModelError, RewardFunctionError
from align.scorers import (
    Classifier,
    RewardFunction,
    _longest,  # pyright: ignore[reportPrivateUsage]
    log_odds,
)
from tests.align.classifiers import write_classifier

CPU = torch.device("cpu")
HERE = "tests.align.scoring_functions"


def classifier(folder: Path, label: str | None = "positive", *, sees_prompt: bool = False) -> Classifier:
    return Classifier(str(folder), revision=None, label=label, sees_prompt=sees_prompt, device=CPU)


def test_log_odds_of_one_class_against_the_others() -> None:
    # p = 0.5, 0.3, 0.2: ln(0.3/0.7); a shift of all logits changes nothing
    logits_BC = torch.tensor([[0.5, 0.3, 0.2]]).log()
    assert log_odds(logits_BC, 1).item() == pytest.approx(math.log(0.3 / 0.7))
    assert log_odds(logits_BC + 9, 1).item() == pytest.approx(math.log(0.3 / 0.7), rel=1e-5)


def test_a_classifiers_score_is_the_log_odds_of_the_named_label(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = ["good day", "bad", "good good day day"]
    found = classifier(folder)(["x"] * 3, texts)
    for text, score in zip(texts, found.tolist(), strict=True):
        probability = model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0, 1].item()
        assert score == pytest.approx(math.log(probability / (1 - probability)), rel=1e-4)
    torch.testing.assert_close(classifier(folder, "negative")(["x"] * 3, texts), -found)
    alone = classifier(folder)(["x"], texts[1:2])  # padding beside longer texts changes nothing
    torch.testing.assert_close(alone, found[1:2])


def test_of_labels_that_do_not_exclude_one_another_the_log_odds_are_the_logit(tmp_path: Path) -> None:
    labels = ("rude", "toxic", "spam")
    folder = write_classifier(tmp_path, labels=labels, problem_type="multi_label_classification")
    encoded = AutoTokenizer.from_pretrained(folder)("good day", return_tensors="pt")
    logits = AutoModelForSequenceClassification.from_pretrained(folder)(**encoded).logits[0]
    probability = logits.sigmoid()[1].item()
    score = classifier(folder, "toxic")(["x"], ["good day"])[0].item()
    assert score == pytest.approx(math.log(probability / (1 - probability)), rel=1e-4)
    assert score == pytest.approx(logits[1].item())


@pytest.mark.parametrize("sees_prompt", [False, True])
def test_a_text_that_is_too_long_is_cut_off_where_the_classifier_ends(sees_prompt: bool, tmp_path: Path) -> None:
    folder = write_classifier(tmp_path)  # of 64 positions, with a tokenizer that knows of no limit
    long, longer = "good " * 62, "good " * 62 + "bad " * 99
    found = classifier(folder, sees_prompt=sees_prompt)(["", ""], [long, longer])
    assert found.isfinite().all()
    if not sees_prompt:
        assert found[0] == found[1]


def test_a_classifier_reads_the_prompt_only_if_asked(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path)
    prompts, texts = ["good", "bad"], ["day", "day"]
    alone, both = classifier(folder)(prompts, texts), classifier(folder, sees_prompt=True)(prompts, texts)
    assert alone[0] == alone[1]
    assert both[0] != both[1]


def test_a_classifier_with_one_output_has_its_output_as_the_score(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path, labels=("score",))
    found = classifier(folder, None)(["x"], ["good day"])
    encoded = AutoTokenizer.from_pretrained(folder)("good day", return_tensors="pt")
    own = AutoModelForSequenceClassification.from_pretrained(folder)(**encoded).logits[0, 0]
    torch.testing.assert_close(found[0], own)
    with pytest.raises(ConfigError, match="has one output and no labels"):
        classifier(folder, "positive")


@pytest.mark.parametrize("label", [None, "happy"])
def test_a_label_that_is_not_there_is_told_with_those_that_are(label: str | None, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"it has negative, positive, not {label!r}"):
        classifier(write_classifier(tmp_path), label)


def test_a_folder_that_is_no_classifier_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        classifier(tmp_path / "missing")
    folder = write_classifier(tmp_path / "headless")
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["classifier.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"no trained classifier: it lacks classifier\.weight"):
        classifier(folder)
    (folder / "model.safetensors").write_bytes(b"not this")
    with pytest.raises(ModelError, match="cannot be loaded"):
        classifier(folder)


def test_a_function_is_given_prompt_and_response() -> None:
    found = RewardFunction(f"{HERE}:lengths", timeout_seconds=5)(["abc", ""], ["de", "xyz"])
    assert found.tolist() == [3002.0, 3.0]


@pytest.mark.parametrize("name", ["of_numpy", "of_torch"])
def test_a_function_may_give_back_a_number_of_numpy_or_torch(name: str) -> None:
    assert RewardFunction(f"{HERE}:{name}", timeout_seconds=5)(["p"], ["abc"]).tolist() == [3.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raising", "raised KeyError: 'colour' for the response 'some words'"),
        ("slow", r"took more than timeout_seconds 0\.2 for the response 'some words'"),
        ("nan", "gave back nan for the response 'some words'; it must be a finite number"),
        ("text", "gave back 'good' for the response"),
        ("two", r"gave back tensor\(\[0., 0.\]\) for the response"),
        ("leaving", "raised SystemExit: 3 for the response"),
    ],
)
def test_a_function_that_fails_is_named_with_the_response(name: str, message: str) -> None:
    function = RewardFunction(f"{HERE}:{name}", timeout_seconds=0.2)
    with pytest.raises(RewardFunctionError, match=f"{HERE}:{name} {message}"):
        function(["p"], ["some words"])


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("no_such_module:f", "importing no_such_module failed: ModuleNotFoundError"),
        (f"{HERE}:no_such_function", "has no function no_such_function"),
        (f"{HERE}:time", "has no function time"),
    ],
)
def test_a_function_that_is_not_there_is_a_config_error(target: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RewardFunction(target, timeout_seconds=1)


def test_more_texts_than_are_read_at_once_are_each_scored_behind_their_own_prompt(tmp_path: Path) -> None:
    reads = classifier(write_classifier(tmp_path), sees_prompt=True)
    found = reads(["good"] * 32 + ["bad"] * 8, ["day"] * 40)
    good, bad = reads(["good", "bad"], ["day", "day"])
    torch.testing.assert_close(found, torch.stack([good] * 32 + [bad] * 8))


def test_a_classifier_that_counts_positions_from_behind_the_paddings_takes_so_many_less() -> None:
    config = RobertaConfig(
        vocab_size=10, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    config.max_position_embeddings, config.pad_token_id = 20, 1
    model = RobertaForSequenceClassification(config)
    longest = _longest(model, SimpleNamespace(model_max_length=10**30))
    assert longest == 18
    model(input_ids=torch.full((1, longest), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, longest + 1), 5))
