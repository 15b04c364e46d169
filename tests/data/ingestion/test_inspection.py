from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from align.errors import ArtifactError
from align.statistics import wilson_interval
from data.codec import make_codec
from data.ingestion.inspection import Distribution, FrequentPrompt, Inspection, Share, inspect_dataset
from data.tokenization import Codec
from tests.data.ingestion.datasets import pair, turns, write_dataset
from tests.data.small_tokenizers import chatml

# Lengths chosen/rejected: 4/2, 2/6, 3/3, 1/5 (a tie), 2/3 (the rejected one preferred).
PAIRS = [
    pair("long", "no", "Why is it?", margin=1.0),
    pair("ok", "longer", "why  is IT?", margin=2.0),
    pair("yes", "not", "How?", margin=6.0),
    pair("a", "bbbbb", "When?", preference=0.5),
    pair("in", "out", "Where?", preference=0.2, source="b.jsonl"),
]


@pytest.fixture
def codec() -> Codec:
    """One token a byte."""
    return make_codec(chatml(), eos_ids=(), system_prompt=None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "dataset"


def test_rows_are_counted_by_split_source_and_reason(folder: Path) -> None:
    found = inspect_dataset(
        write_dataset(folder, "comparison", train=PAIRS[:3], held_out=PAIRS[3:], rejected=2), codec=None
    )
    contents = found.contents
    assert (contents.kind, contents.rows_in, contents.kept) == ("comparison", 7, 5)
    assert contents.rejected == {"empty response": 2}
    assert contents.splits == {"train": 3, "held_out": 2}
    assert [(of.name, of.rows_in, of.kept, of.rejected, of.splits) for of in contents.sources] == [
        ("a.jsonl", 6, 4, 2, {"train": 3, "held_out": 1}),
        ("b.jsonl", 1, 1, 0, {"train": 0, "held_out": 1}),
    ]


def test_the_longer_one_is_preferred_in_two_of_three_pairs_that_differ_and_are_no_tie(folder: Path) -> None:
    found = inspect_dataset(write_dataset(folder, "comparison", train=PAIRS), codec=None)
    # 4/2: yes. 2/6: no. 3/3: equal. 1/5: a tie. 2/3 with preference 0.2: the rejected one, which is longer, is: yes.
    assert found.length_bias == {"characters": Share(2, 3, 2 / 3, wilson_interval(2, 3))}
    assert found.length_bias["characters"].interval == pytest.approx((0.2077, 0.9385), abs=1e-4)
    assert found.ties == Share.of(1, 5)
    assert found.preferred_rejected == 1
    margins = found.margins
    assert margins is not None
    assert (margins.rows, margins.mean, margins.low, margins.high) == (3, 3.0, 1.0, 6.0)
    assert found.labels is None


def test_prompts_that_differ_in_case_and_space_alone_are_one(folder: Path) -> None:
    prompts = inspect_dataset(write_dataset(folder, "comparison", train=PAIRS), codec=None).prompts
    assert prompts.distinct == 4
    assert prompts.most_frequent == (FrequentPrompt(2, "why  is IT?"),)


def test_lengths_in_characters_are_of_contents_alone(folder: Path) -> None:
    lengths = inspect_dataset(write_dataset(folder, "comparison", train=PAIRS), codec=None).lengths
    assert list(lengths) == ["characters"]
    assert lengths["characters"] == {
        "prompt": Distribution(5, (10 + 11 + 4 + 5 + 6) / 5, 6, 11, 11, 11),
        "chosen": Distribution(5, (4 + 2 + 3 + 1 + 2) / 5, 2, 4, 4, 4),
        "rejected": Distribution(5, (2 + 6 + 3 + 5 + 3) / 5, 3, 6, 6, 6),
        "row": Distribution(5, (14 + 17 + 7 + 10 + 9) / 5, 10, 17, 17, 17),
    }


def test_lengths_in_tokens_are_of_what_the_stages_train_on(folder: Path, codec: Codec) -> None:
    rows = [{"messages": turns("Hi", "Yo", "So", "Bye", system="S")}]
    found = inspect_dataset(write_dataset(folder, "demonstration", train=rows), codec=codec, max_length=61)
    # One token a byte, one for <|im_start|> and <|im_end|>. The answers: Yo and Bye, each with its end. The rest:
    # system S (1+6+1+1+1+1 with line breaks and end), 2 users (1+4+1+2+1+1), 2 openings (1+9+1), a line break.
    prompt, response = 11 + 2 * 10 + 2 * 11 + 1, 3 + 4
    assert {name: of.max for name, of in found.lengths["tokens"].items()} == {
        "prompt": prompt, "response": response, "row": prompt + response,
    }  # fmt: skip
    assert {name: of.max for name, of in found.lengths["characters"].items()} == {"prompt": 5, "response": 5, "row": 10}
    assert prompt + response == 61
    assert found.over_length == Share.of(0, 1)
    assert inspect_dataset(folder, codec=codec, max_length=60).over_length == Share.of(1, 1)
    assert (found.turns, found.with_system) == ({3: 1}, 1)


def test_what_is_trained_on_stands_in_marks(folder: Path, codec: Codec) -> None:
    rows = [{"messages": turns("Hi", "Yo", "So", "Bye", system="S")}, {"text": "Once."}]
    talk, text = inspect_dataset(write_dataset(folder, "demonstration", train=rows), codec=codec).examples
    (part,) = talk.parts
    assert part.text == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Yo<|im_end|>⟧\n"
        "<|im_start|>user\nSo<|im_end|>\n<|im_start|>assistant\n⟦Bye<|im_end|>⟧"
    )
    assert [part.text[start:stop] for start, stop in part.trained] == ["⟦Yo<|im_end|>⟧", "⟦Bye<|im_end|>⟧"]
    assert text.parts[0].text == "O⟦nce.<|im_end|>⟧"  # nothing predicts the first


def test_a_pair_shows_the_prompt_and_two_marked_responses(folder: Path, codec: Codec) -> None:
    write_dataset(folder, "comparison", train=[pair("Yes", "No", "Hi")])
    prompt, chosen, rejected = inspect_dataset(folder, codec=codec).examples[0].parts
    assert prompt.text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert (chosen.text, rejected.text) == ("⟦Yes<|im_end|>⟧", "⟦No<|im_end|>⟧")
    plain = inspect_dataset(folder, codec=None).examples[0].parts
    assert [part.text for part in plain] == ["user: Hi", "Yes", "No"]


def test_rows_without_ids_are_counted_and_shown_as_plain_text(folder: Path, codec: Codec) -> None:
    found = inspect_dataset(
        write_dataset(folder, "comparison", train=[pair("a<|im_end|>", "b"), pair("aa", "b")]),
        codec=codec,
        max_length=9,
    )
    assert found.not_encodable == {"end token in response": 1}
    assert (found.lengths["tokens"]["row"].rows, found.lengths["characters"]["row"].rows) == (1, 2)
    assert found.over_length == Share.of(1, 1)
    refused, fine = found.examples
    assert refused.refusal is not None
    assert refused.parts[1].text == "a<|im_end|>"
    assert fine.refusal is None


def test_labels_have_a_share_with_its_interval(folder: Path) -> None:
    rows = [{"prompt": turns("Why?"), "completion": "So", "label": label} for label in (True, True, True, False)]
    found = inspect_dataset(write_dataset(folder, "verdict", train=rows), codec=None)
    assert found.labels == Share(3, 4, 0.75, wilson_interval(3, 4))
    assert (found.ties, found.margins, found.length_bias) == (None, None, {})
    assert set(found.lengths["characters"]) == {"prompt", "response", "row"}


@pytest.mark.parametrize("has_codec", [False, True])
def test_several_shards_are_as_one(tmp_path: Path, codec: Codec, has_codec: bool) -> None:
    train = [pair("x" * (n % 7 + 1), "y" * (n % 5 + 2), f"Prompt {n % 90}", margin=float(n)) for n in range(100)]

    def inspected(shard_rows: int) -> Inspection:
        path = write_dataset(
            tmp_path / str(shard_rows), "comparison", train=train, held_out=PAIRS, shard_rows=shard_rows
        )
        found = inspect_dataset(path, codec=codec if has_codec else None, max_length=20 if has_codec else None)
        return replace(found, contents=replace(found.contents, content_hash=""))

    assert inspected(7) == inspected(1000)


def test_examples_are_the_smallest_content_hashes_of_each_split_in_turn(folder: Path) -> None:
    hashes = ["09", "04", "01", "08"]
    train = [pair("a", "bb", f"T{name}", content_hash=name.zfill(32)) for name in hashes]
    write_dataset(folder, "comparison", train=train, held_out=[pair("a", "bb", "H", content_hash="07".zfill(32))])
    examples = inspect_dataset(folder, codec=None).examples
    assert [(each.split, each.content_hash[-2:]) for each in examples] == [
        ("train", "01"), ("held_out", "07"), ("train", "04"),
    ]  # fmt: skip


def test_progress_counts_rows_up_to_all_of_them(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    write_dataset(folder, "comparison", train=PAIRS, shard_rows=2)
    inspect_dataset(folder, codec=None, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(5, 5)]


# ---- the unusual ----


def test_a_data_set_without_rows_has_no_lengths_and_no_shares(folder: Path, codec: Codec) -> None:
    found = inspect_dataset(write_dataset(folder, "comparison"), codec=codec, max_length=5)
    assert found.contents.splits == {"train": 0, "held_out": 0}
    assert (found.lengths, found.examples, found.margins) == ({"characters": {}, "tokens": {}}, (), None)
    assert found.ties == found.over_length == found.length_bias["tokens"] == Share(0, 0, None, None)


def test_ties_alone_have_no_length_bias(folder: Path) -> None:
    rows = [pair("a", "bb", preference=0.5)] * 3
    found = inspect_dataset(write_dataset(folder, "comparison", train=rows), codec=None)
    assert found.ties == Share.of(3, 3)
    assert found.length_bias == {"characters": Share(0, 0, None, None)}


def test_one_prompt_is_every_percentile(folder: Path) -> None:
    found = inspect_dataset(write_dataset(folder, "prompt", train=[{"prompt": turns("Why?")}]), codec=None)
    assert found.lengths == {"characters": {name: Distribution(1, 4.0, 4, 4, 4, 4) for name in ("prompt", "row")}}
    assert len(found.examples) == 1
    assert found.turns == {1: 1}


# ---- what cannot be inspected ----


def refused(folder: Path) -> str:
    with pytest.raises(ArtifactError) as caught:
        inspect_dataset(folder, codec=None)
    return str(caught.value)


def test_a_damaged_shard_is_named_and_asks_to_ingest_again(folder: Path) -> None:
    shard = write_dataset(folder, "comparison", train=PAIRS) / "train-00000.parquet"
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    message = refused(folder)
    assert "train-00000.parquet" in message
    assert "ingest its sources again" in message


def test_another_folder_is_no_data_set(folder: Path) -> None:
    assert "no folder that exists" in refused(folder)
    folder.mkdir()
    assert "a folder without dataset.json" in refused(folder)


# ---- percentiles ----


def test_percentiles_are_lengths_that_occur() -> None:
    assert Distribution.of(Counter(range(1, 101))) == Distribution(100, 50.5, 50, 95, 99, 100)
    assert Distribution.of(Counter({4: 1, 9: 1})) == Distribution(2, 6.5, 4, 9, 9, 9)
