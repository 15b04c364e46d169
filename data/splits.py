"""Held-out splits by prompt: the same prompt is never on both sides, however often it occurs."""

import hashlib
import unicodedata
from collections.abc import Sequence
from itertools import takewhile
from typing import TypeVar

from align.errors import DataError
from data.records import Demonstration, PlainText, Record, parts_of

RecordT = TypeVar("RecordT", bound=Record)


def split_by_prompt(
    records: Sequence[RecordT], *, held_out_fraction: float, seed: int
) -> tuple[tuple[RecordT, ...], tuple[RecordT, ...]]:
    """(train, held out), both in the order given; the fraction is expected of the distinct prompts, not exact.

    A prompt's side depends on the prompt, the seed and the fraction alone: so it is the same in every data set of
    a run, and a prompt held out of one stage is not trained on in another. DataError if a side is empty.
    """
    train: list[RecordT] = []
    held_out: list[RecordT] = []
    for record in records:
        is_held_out = prompt_key(normalized_prompt(record), seed) < int(held_out_fraction * 2**64)
        (held_out if is_held_out else train).append(record)
    if not train or not held_out:
        raise DataError(
            f"held_out_fraction {held_out_fraction} of {len(records)} rows leaves {len(train)} to train on and "
            f"{len(held_out)} held out; give held_out, a source of its own, or another held_out_fraction"
        )
    return tuple(train), tuple(held_out)


def shared_prompts(train: Sequence[Record], held_out: Sequence[Record]) -> int:
    """How many distinct held-out prompts also occur in train: a leak, unless it is 0."""
    return len({normalized_prompt(record) for record in held_out} & {normalized_prompt(record) for record in train})


def normalized_prompt(record: Record) -> str:
    """The turns that wait for an answer, without system message, case, and differences of white space or Unicode.

    A demonstration's are those before its first assistant turn, since all the others are learnt with it.
    """
    if isinstance(record, PlainText):
        return normalize(record.text)
    turns, _ = parts_of(record)
    if isinstance(record, Demonstration):
        turns = takewhile(lambda turn: turn.role != "assistant", turns)
    return "\x1e".join(f"{turn.role}\x1f{normalize(turn.content)}" for turn in turns if turn.role != "system")


def normalize(text: str) -> str:
    """Without case, and without differences of white space or Unicode forms."""
    if text.isascii():  # the same, several times as fast
        return " ".join(text.lower().split())
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def prompt_key(prompt: str, seed: int) -> int:
    """An integer in [0, 2**64) that is a function of the normalised prompt and the seed."""
    return int.from_bytes(hashlib.blake2b(f"{seed}\x1d{prompt}".encode(), digest_size=8).digest())
