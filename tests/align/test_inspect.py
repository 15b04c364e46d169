import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from align.base import load_base, load_codec
from align.config import BaseModelConfig
from align.inspect_view import inspection_view
from align.show import PlainDisplay, late_progress
from data.ingestion.inspection import inspect_dataset
from tests.align.test_cli import align
from tests.data.ingestion.datasets import pair, turns, write_dataset
from tests.resident import SHAPES

ROWS = [pair("Because\x1b[2J", "No", margin=0.5), pair("Yes [bold]", "It is not so"), pair("a", "bb", preference=0.5)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "pairs", "comparison", train=ROWS, held_out=[pair("Yes", "No", "How?")], rejected=3)


def test_json_holds_every_number_and_nothing_else_is_on_stdout(folder: Path) -> None:
    finished = align("inspect", folder, "--json")
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == ""  # nothing heavy was loaded either
    found: dict[str, Any] = json.loads(finished.stdout)
    assert set(found) == {
        "contents", "turns", "with_system", "lengths", "max_length", "over_length", "not_encodable", "length_bias",
        "ties", "preferred_rejected", "margins", "labels", "prompts", "examples",
    }  # fmt: skip
    assert found["contents"]["rejected"] == {"empty response": 3}
    assert found["turns"] == {"1": 4}
    assert found["lengths"]["characters"]["chosen"]["max"] == 11  # Because and an escape sequence of four
    assert found["length_bias"]["characters"]["count"] == 2
    assert found["prompts"]["most_frequent"] == [{"rows": 3, "excerpt": "Why?"}]
    assert len(found["examples"]) == 3


def test_with_a_tokenizer_rows_over_the_length_are_counted_and_learnt_tokens_marked(folder: Path) -> None:
    finished = align(
        "inspect", folder, "--tokenizer", "tiny:llama", "--max-length", "40", "--system-prompt", "S", "--json"
    )
    assert finished.returncode == 0, finished.stderr
    found: dict[str, Any] = json.loads(finished.stdout)
    assert set(found["lengths"]) == set(found["length_bias"]) == {"characters", "tokens"}
    assert found["over_length"]["total"] == 4
    assert found["examples"][1]["parts"][1]["text"] == "⟦Yes<|im_end|>⟧"
    assert "system\nS<|im_end|>" in found["examples"][0]["parts"][0]["text"]


def test_the_tables_and_the_page_show_the_same_counts(folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    finished = align("inspect", folder, "--html", page, "--quiet")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.endswith(f"page: {page}\n")
    html = page.read_text(encoding="utf-8")
    for text in (finished.stdout, html):
        for shown in ("7 rows in, 4 kept", "a.jsonl", "empty response", "0.667 [0.208, 0.939] (2 of 3)",
                      "0.250 [0.046, 0.699] (1 of 4)", "Yes [bold]", "most frequent prompts"):  # fmt: skip
            assert shown in text
        assert "\x1b" not in text
    assert html.startswith("<!DOCTYPE html>")
    assert "http" not in html.replace("http-equiv", "")  # it refers to no other file
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "pairs"]


def table_rows(folder: Path) -> list[list[str]]:
    console = Console(record=True, width=160, file=io.StringIO())
    console.print(inspection_view(inspect_dataset(folder, codec=None)))
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in console.export_text().splitlines()]


def test_every_count_and_length_stands_in_its_own_column(folder: Path) -> None:
    rows = table_rows(folder)
    assert ["a.jsonl", "prompt, chosen, rejected", "7", "4", "3", "3", "1"] in rows
    lengths = [1] * 94 + [2] * 4 + [3, 4]  # p50 1, p95 2, p99 3
    texts = [pair("a" * n, "b", f"{number}?") for number, n in enumerate(lengths)]
    write_dataset(folder.parent / "long", "comparison", train=texts)
    assert ["chosen, characters", "1.1", "1", "2", "3", "4"] in table_rows(folder.parent / "long")


def test_the_share_of_good_answers_is_of_the_verdicts(tmp_path: Path) -> None:
    rows = [{"prompt": turns(f"{n}?"), "completion": "a", "label": n < 3} for n in range(4)]
    write_dataset(tmp_path / "verdicts", "verdict", train=rows)
    console = Console(record=True, width=160, file=io.StringIO())
    console.print(inspection_view(inspect_dataset(tmp_path / "verdicts", codec=None)))
    good = next(line for line in console.export_text().splitlines() if line.startswith("good"))
    assert "0.750" in good
    assert "(3 of 4)" in good


def test_on_a_terminal_what_is_learnt_is_green(folder: Path) -> None:
    found = inspect_dataset(folder, codec=load_codec(BaseModelConfig(model="tiny:llama"), system_prompt=None))
    console = Console(record=True, width=120, quiet=False, force_terminal=True)
    console.print(inspection_view(found))
    assert "\x1b[32m⟦Yes<|im_end|>⟧\x1b[0m" in console.export_text(styles=True)


def test_a_long_part_is_shown_by_its_two_ends(tmp_path: Path) -> None:
    write_dataset(tmp_path / "long", "comparison", train=[pair("begins " + "x" * 9_000 + " ends", "No")])
    console = Console(record=True, width=120)
    console.print(inspection_view(inspect_dataset(tmp_path / "long", codec=None)))
    text = console.export_text()
    for shown in ("begins", "… 7,812 characters …", "xx ends"):
        assert shown in text


def test_a_page_that_cannot_be_written_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    finished = align("inspect", folder, "--html", tmp_path / "taken")
    assert finished.returncode == 2
    assert "--html: cannot write" in finished.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pairs", "taken"]


def failed(*arguments: str | Path) -> str:
    finished = align("inspect", *arguments, "--quiet")
    assert finished.returncode == 2
    assert finished.stdout == ""
    assert "Traceback" not in finished.stderr
    return finished.stderr


def test_what_cannot_be_inspected_is_one_message_and_exit_code_2(folder: Path, tmp_path: Path) -> None:
    assert "error: nowhere is not a data set of `align ingest`, but no folder that exists; make one" in failed(
        "nowhere"
    )
    assert "is not a data set of `align ingest`, but a file; make one" in failed(__file__)
    assert "is not a data set of `align ingest`" in failed(tmp_path)
    assert "error: --tokenizer: './nowhere' is not a folder that exists" in failed(folder, "--tokenizer", "./nowhere")
    assert "give --tokenizer, too" in failed(folder, "--max-length", "9")
    (folder / "train-00000.parquet").write_bytes(b"PAR1")
    assert "train-00000.parquet differs" in failed(folder)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_codec_without_the_weights_is_the_bases_own(shape: str) -> None:
    config = BaseModelConfig(model=f"tiny:{shape}")
    alone, whole = load_codec(config, system_prompt=None), load_base(config).codec(None)
    assert (alone.eos_ids, alone.end_of_turn_id, alone.pad_id) == (whole.eos_ids, whole.end_of_turn_id, whole.pad_id)
    assert alone.tokenizer.get_vocab() == whole.tokenizer.get_vocab()
    assert alone.tokenizer.chat_template == whole.tokenizer.chat_template


def test_what_takes_over_two_seconds_says_its_pace(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [100.0]
    monkeypatch.setattr("align.show.time.time", lambda: clock[0])
    report = late_progress(PlainDisplay(sys.stdout), stage="inspect", doing="reading rows")
    clock[0] += 1.9
    report(190, 1000)
    assert capsys.readouterr().out == ""
    clock[0] += 0.6
    report(250, 1000)
    assert capsys.readouterr().out == "inspect: reading rows, 250/1000 100.0/s, 0:08 left\n"
