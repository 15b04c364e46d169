"""Rows that were once lost, or kept as what they are not, without a word."""

import os
import signal
import time
from pathlib import Path
from typing import Any, cast

import pytest

from align.errors import DataError, UsageError
from align.ingest import as_columns
from data.codec import make_codec
from data.formats import parse_row
from data.ingestion.rules import TokenRule
from data.readers import as_text
from data.records import Comparison, Reject
from data.tokenization import Codec
from tests.benchmarks import hh_shaped
from tests.data.ingestion.outcome import start_ingestion
from tests.data.ingestion.test_ingest import account_of, make, noted, pair, rejects_of, rows_of, written
from tests.data.small_tokenizers import CHATML, chatml


def text(path: Path, content: str) -> Path:
    path.write_text(content)
    return path


def test_a_stray_quote_costs_its_row_and_no_other(tmp_path: Path) -> None:
    rows = 'prompt,chosen,rejected\np0,c0,r0\np1,"c1" she said,r1\np2,c2,"r ""2"", and\nso on"\np3,c3,r3\n'
    dataset = make(tmp_path, text(tmp_path / "q.csv", rows))
    assert [row["chosen"] for row in rows_of(dataset)] == ["c0", "c2", "c3"]
    assert rows_of(dataset)[1]["rejected"] == 'r "2", and\nso on'
    (reject,) = rejects_of(dataset)
    assert (reject["line"], reject["reason"]) == (3, "malformed")
    assert "a quote that does not fit" in reject["detail"]


def test_a_quote_that_is_never_closed_is_told_and_takes_no_row_into_another(tmp_path: Path) -> None:
    rows = 'prompt,chosen,rejected\np0,c0,r0\np1,c1,"oops it begins\np2,c2,r2\np3,c3,r3\n'
    dataset = make(tmp_path, text(tmp_path / "q.csv", rows))
    assert [row["chosen"] for row in rows_of(dataset)] == ["c0"]
    assert [(reject["line"], reject["reason"]) for reject in rejects_of(dataset)] == [(3, "malformed")]
    assert "the quote that opens in line 3 is never closed" in noted[-1]


def test_what_two_bare_answers_begin_with_is_no_prompt_where_there_is_a_column_for_it(tmp_path: Path) -> None:
    row = {"prompt": None, "chosen": "The cat sat", "rejected": "The dog"}
    found = parse_row(row, "a:1", "comparison")
    assert isinstance(found, Reject)
    assert (found.reason, found.field) == ("missing field", "prompt")
    dataset = make(tmp_path, written(tmp_path / "a.jsonl", [pair("a", "b", "c"), row]))
    assert account_of(dataset)["rejected"] == {"missing field": 1}


def test_a_row_of_another_shape_than_the_files_is_rejected_by_name(tmp_path: Path) -> None:
    transcript = "\n\nHuman: x\n\nAssistant: "
    other = {"chosen": f"{transcript}good", "rejected": f"{transcript}bad"}
    rows = [pair("a", "b", "c"), pair("d", "e", "f"), other]
    dataset = make(tmp_path, written(tmp_path / "a.jsonl", rows))
    (reject,) = rejects_of(dataset)
    assert (reject["line"], reject["reason"]) == (3, "another shape")
    assert "this row is hh-rlhf, the file trl-preference" in reject["detail"]
    assert len(rows_of(make(tmp_path, tmp_path / "a.jsonl", to="named", shape="trl-preference"))) == 3  # as it was told


def test_opposite_pairs_under_other_norms_contradict_nobody(tmp_path: Path) -> None:
    def asked(norms: str) -> Any:
        return [{"role": "system", "content": norms}, {"role": "user", "content": "Explain DNS"}]

    def answers(chosen: str, rejected: str) -> dict[str, object]:
        sides = {"chosen": chosen, "rejected": rejected}
        return {side: [{"role": "assistant", "content": said}] for side, said in sides.items()}

    rows = [{"prompt": asked(norms), **answers(*sides)} for norms, sides in
            (("Be terse.", ("A", "B")), ("Be thorough.", ("B", "A")), ("Be terse.", ("B", "A")))]  # fmt: skip
    dataset = make(tmp_path, written(tmp_path / "a.jsonl", rows[:2]))
    assert account_of(dataset)["kept"] == 2
    dataset = make(tmp_path, written(tmp_path / "b.jsonl", rows), to="b")
    assert [(r["line"], r["reason"]) for r in rejects_of(dataset)] == [(1, "contradictory"), (3, "contradictory")]


def test_a_prompt_whose_held_out_rows_were_rejected_is_not_held_out(tmp_path: Path) -> None:
    held_out = written(tmp_path / "h.jsonl", [pair("p", "A", "B"), pair("p", "B", "A"), pair("q", "A", "B")])
    train = written(tmp_path / "t.jsonl", [pair("p", "C", "D"), pair("q", "C", "D")])
    dataset = make(tmp_path, train, held_out=(str(held_out),))
    assert [row["chosen"] for row in rows_of(dataset)] == ["C"]
    assert account_of(dataset)["rejected"] == {"contradictory": 2, "prompt is held out": 1}


@pytest.mark.parametrize(
    ("columns", "unknown"),
    [
        ({"prompt": "instruction+contxt", "completion": "response"}, "has no column contxt; did you mean context"),
        ({"prompt": "instruction", "chosen": "response", "rejected": "context", "margin": "mm"}, "has no column mm"),
    ],
)
def test_a_column_that_no_row_has_is_no_optional_one(columns: dict[str, str], unknown: str, tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", [{"instruction": "i", "context": None, "response": "r"}])
    with pytest.raises(UsageError, match=unknown):
        make(tmp_path, path, columns=tuple(columns.items()))


def test_a_target_of_map_stands_once() -> None:
    with pytest.raises(UsageError, match="prompt stands twice; a prompt of several columns is prompt=a\\+b"):
        as_columns("prompt=system,prompt=question,completion=answer")


def test_columns_that_are_called_like_numbers_are_meant_by_their_names(tmp_path: Path) -> None:
    rows = [{"q": "x", "1": "one", "2": "two", "winner": winner} for winner in ("1", "2")]
    columns = {"prompt": "q", "first": "1", "second": "2", "better": "winner"}
    dataset = make(tmp_path, written(tmp_path / "a.jsonl", rows[:1]), columns=tuple(columns.items()))
    assert rows_of(dataset)[0]["chosen"] == "one"
    dataset = make(tmp_path, written(tmp_path / "b.jsonl", rows[1:]), to="b", columns=tuple(columns.items()))
    assert rows_of(dataset)[0]["chosen"] == "two"


def during(tmp_path: Path, change: Any) -> Any:
    """An engine that lets something happen once all pieces are read."""

    def execute(function: Any, pieces: Any) -> Any:
        yield from map(function, pieces)
        change()

    return execute


def test_what_appears_in_the_data_sets_place_meanwhile_stays(tmp_path: Path) -> None:
    def appear() -> None:
        (tmp_path / "set").mkdir()
        (tmp_path / "set" / "precious.txt").write_text("mine")

    path = written(tmp_path / "a.jsonl", [pair("a", "b", "c")])
    with pytest.raises(UsageError, match="is there already"):
        make(tmp_path, path, engine=during(tmp_path, appear))
    assert (tmp_path / "set" / "precious.txt").read_text() == "mine"


@pytest.mark.parametrize("left", [0, 1])
def test_a_source_that_changes_while_it_is_read_is_told(left: int, tmp_path: Path) -> None:
    rows = [pair("a", "b", "c"), pair("a", "b", "c")]  # of which the second is read again, to be given whole
    path = written(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=r"a\.jsonl was changed while it was read; nothing was written"):
        make(tmp_path, path, engine=during(tmp_path, lambda: written(path, rows[:left])))
    assert not (tmp_path / "set").exists()


def test_a_row_too_deep_to_be_written_is_still_a_row() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    assert as_text({"a": deep}) == "a deeply nested row"


def turns(*contents: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": content} for n, content in enumerate(contents)]


def test_a_prompt_beside_whole_conversations_is_how_they_begin_or_end() -> None:
    def compared(prompt: object) -> Comparison | Reject:
        sides = {side: turns("hello", "hi", "and now?", side) for side in ("chosen", "rejected")}
        return cast(Comparison | Reject, parse_row({"prompt": prompt, **sides}, "a:1", "comparison"))

    for prompt in ("hello", "and now?", " and now?\n", turns("hello", "hi", "and now?")):
        assert isinstance(compared(prompt), Comparison)
    other = compared("What is the capital of France?")
    assert isinstance(other, Reject)
    assert (other.reason, other.field) == ("prompts differ", "prompt")
    norms = {"role": "system", "content": "Always answer in German."}
    with_norms = compared([norms, *turns("hello", "hi", "and now?")])
    assert isinstance(with_norms, Comparison)
    assert [message.content for message in with_norms.prompt][:2] == ["Always answer in German.", "hello"]


def test_opposite_statements_are_no_near_duplicates(tmp_path: Path) -> None:
    words = " ".join(f"word{n}" for n in range(40))
    verdicts = [{"prompt": "p", "completion": f"{words} {n}", "label": n == 0} for n in range(2)]
    dataset = make(tmp_path, written(tmp_path / "v.jsonl", verdicts), near_threshold=0.8)
    assert account_of(dataset)["kept"] == 2
    pairs = [pair("p", f"{words} {n}", "no", preference=0.9 - 0.8 * n) for n in range(2)]
    dataset = make(tmp_path, written(tmp_path / "p.jsonl", pairs), to="p", near_threshold=0.8)
    assert account_of(dataset)["kept"] == 2


def forgetful_codec(name: str, system_prompt: str | None) -> Codec:
    """Of a template that leaves out what earlier answers thought, as Qwen3's does."""
    tokenizer = chatml()
    tokenizer.chat_template = CHATML.replace(
        "message['content'] +", "(message['content'].split('</think>')[-1] if not loop.last else message['content']) +"
    )
    return make_codec(tokenizer, eos_ids=[cast(int, tokenizer.eos_token_id)], system_prompt=system_prompt)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_what_a_template_rewrites_is_rejected_whatever_stands_before_it(order: tuple[int, int], tmp_path: Path) -> None:
    plain, thinking = turns("q", "a", "r", "b"), turns("q", "<think>hm</think>a", "r", "b")
    rows = [{"messages": (plain, thinking)[n]} for n in order]
    rule = TokenRule(9999, f"forgetful {order}", None, forgetful_codec)
    dataset = make(tmp_path, written(tmp_path / "a.jsonl", rows), tokens=rule)
    assert [(r["line"], r["reason"]) for r in rejects_of(dataset)] == [
        (order.index(1) + 1, "template rewrites earlier turns")
    ]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "p", "completion": "c", "label": False}, "judged answer"),
        ({"messages": [*turns("q"), {"role": "assistant", "content": "a", "weight": 0}]}, "unlearnt turn"),
        ({"messages": [*turns("q"), {"role": "assistant", "content": "a", "tool_calls": [{}]}]}, "role order"),
    ],
)
def test_what_is_not_to_be_learnt_is_no_demonstration(row: dict[str, object], reason: str) -> None:
    found = parse_row(row, "a:1", "demonstration")
    assert isinstance(found, Reject)
    assert found.reason == reason


def test_a_terminated_ingestion_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    hh_shaped.write(path, 30_000)  # seconds of work, of which the signal needs the first
    to = tmp_path / "made" / "set"
    to.parent.mkdir()
    with start_ingestion([path], to) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        until = time.monotonic() + 60
        while len(workers := children.read_text().split()) < 2 and time.monotonic() < until:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 143
    until = time.monotonic() + 20
    while any(map(is_alive, workers)) and time.monotonic() < until:
        time.sleep(0.05)
    assert workers
    assert not any(map(is_alive, workers))
    assert list(to.parent.iterdir()) == []


def is_alive(pid: str) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_a_source_that_is_rewritten_at_the_same_length_is_told_too(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", [pair("a", "b", "c")] * 2)

    def rewrite() -> None:
        written(path, [pair("x", "b", "c")] * 2)
        os.utime(path, (1, 1))

    with pytest.raises(DataError, match=r"a\.jsonl was changed while it was read; nothing was written"):
        make(tmp_path, path, engine=during(tmp_path, rewrite))


def test_a_file_that_cannot_be_read_as_utf8_is_told_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes('{"prompt": "a", "chosen": "é", "rejected": "c"}\n'.encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.jsonl:1: malformed \(not UTF-8 from byte 27 of the row on; save the"):
        make(tmp_path, path)
    assert noted[-1] == f"warning: {path}: none of its first rows can be read"
