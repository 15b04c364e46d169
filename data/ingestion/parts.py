"""A row in its parts, as text and as token ids, with what is trained on told apart."""

from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from itertools import groupby
from typing import cast

from data.records import Demonstration, PlainText, Record, parts_of
from data.tokenization import Codec, encode_conversation, encode_demonstrations, encode_prompt, encode_response

_WHOLE = 2**62  # a max_length that cuts nothing
_OPEN, _CLOSE = "⟦", "⟧"

TextRuns = list[tuple[str, bool]]  # (text, is it trained on), in order
TokenRuns = list[tuple[list[int], bool]]


@dataclass(frozen=True)
class Part:
    name: str  # prompt, chosen, rejected, response, conversation or text
    text: str  # of encoded parts: the chat template's, with what is trained on between ⟦ and ⟧
    trained: tuple[tuple[int, int], ...]  # where in `text` that is: [start, stop), brackets included


def text_runs(record: Record, *, with_roles: bool = False) -> dict[str, TextRuns]:
    """The contents by part; `with_roles` puts the role before each turn, as a person would read it."""
    messages, texts = parts_of(record)
    form = "{0.role}: {0.content}\n\n" if with_roles else "{0.content}"
    is_learnt = isinstance(record, Demonstration)
    turns = [(form.format(turn), is_learnt and turn.role == "assistant") for turn in messages]
    asked = {"conversation" if is_learnt else "prompt": turns} if turns else {}
    return {**asked, **{name: [(text, True)] for name, text in texts.items()}}


def token_runs(codec: Codec, record: Record) -> dict[str, TokenRuns]:
    """As the stages tokenize it, not cut to any length. UnfitError if the codec has no ids for it."""
    if isinstance(record, Demonstration):
        return {"conversation": _runs(*encode_conversation(codec, record.messages))}
    if isinstance(record, PlainText):
        (row,), _ = encode_demonstrations(codec, [record], max_length=_WHOLE)
        return {"text": _runs(row.ids, row.is_response)}
    prompt, texts = parts_of(record)
    responses = {name: [(encode_response(codec, text), True)] for name, text in texts.items()}
    return {"prompt": [(encode_prompt(codec, prompt), False)], **responses}


def _runs(ids: Sequence[int], is_response: Sequence[bool]) -> TokenRuns:
    groups = groupby(zip(ids, is_response, strict=True), key=lambda pair: pair[1])
    return [([token_id for token_id, _ in group], is_learnt) for is_learnt, group in groups]


def part_lengths(parts: Mapping[str, Sequence[tuple[Sized, bool]]]) -> dict[str, int]:
    """By part; a conversation's "response" is all that is trained on in it, its "prompt" the rest."""
    lengths: dict[str, int] = {}
    for name, runs in parts.items():
        for run, is_learnt in runs:
            key = name if name != "conversation" else "response" if is_learnt else "prompt"
            lengths[key] = lengths.get(key, 0) + len(run)
    return lengths


def plain_parts(record: Record) -> tuple[Part, ...]:
    runs = text_runs(record, with_roles=True)
    return tuple(Part(name, "".join(text for text, _ in texts).strip(), ()) for name, texts in runs.items())


def encoded_parts(codec: Codec, record: Record) -> tuple[Part, ...]:
    """The text of the ids, decoded run by run, so that the marks are where the loss mask is."""
    parts: list[Part] = []
    for name, runs in token_runs(codec, record).items():
        text, trained = "", []
        for ids, is_learnt in runs:
            decoded = cast(str, codec.tokenizer.decode(ids, clean_up_tokenization_spaces=False))
            if is_learnt:
                decoded = f"{_OPEN}{decoded}{_CLOSE}"
                trained.append((len(text), len(text) + len(decoded)))
            text += decoded
        parts.append(Part(name, text, tuple(trained)))
    return tuple(parts)
