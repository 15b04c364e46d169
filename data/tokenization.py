"""From messages to token ids: the one tokenization that SFT, reward training and PPO share.

A conversation is tokenized in pieces: the template's text up to an answer, the answer, the template's text up to the
next answer, and so on. So what is trained on is, turn by turn, exactly `encode_prompt` of what went before and
`encode_response` of the answer, whatever tokens the tokenizer would have made across the borders.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar, cast

import jinja2

from data.records import Comparison, Demonstration, Message, PlainText, Prompt, Record, Reject, UnfitError, Verdict

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OnProgress = Callable[[int, int], None]  # (rows done, rows in all)
RecordT = TypeVar("RecordT", bound=Record)
TokenizedT = TypeVar("TokenizedT")


def _silently(done: int, total: int) -> None: ...


class TemplateRewriteError(UnfitError):
    """What the template writes for earlier turns depends on later ones."""


@dataclass(frozen=True)
class Codec:
    """A tokenizer, with what else the pipeline needs to know of it settled; made by `data.codec.make_codec`."""

    tokenizer: "PreTrainedTokenizerBase"
    eos_ids: tuple[int, ...]  # any of them stops a response
    end_of_turn_id: int  # ends every response that is trained on; one of eos_ids
    pad_id: int  # never one of eos_ids
    system_prompt: str | None  # put before conversations without a system message


@dataclass(frozen=True)
class TokenizedDemonstration:
    ids: tuple[int, ...]  # the last is the end-of-turn id
    is_response: tuple[bool, ...]  # True on the answers and the end-of-turn ids after them
    num_cut: int = 0  # tokens that its beginning lost to the length


@dataclass(frozen=True)
class TokenizedComparison:
    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]  # the response alone; the last is the end-of-turn id
    rejected_ids: tuple[int, ...]  # likewise
    margin: float | None = None
    preference: float = 1.0
    source: str = ""
    num_cut: int = 0  # tokens that the prompt's beginning lost to the length


@dataclass(frozen=True)
class TokenizedVerdict:
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]  # the response alone; the last is the end-of-turn id
    is_good: bool
    source: str = ""
    num_cut: int = 0  # likewise


@dataclass(frozen=True)
class TokenizedPrompt:
    ids: tuple[int, ...]  # generation prompt included
    messages: tuple[Message, ...]
    source: str


def encode_prompt(codec: Codec, messages: Sequence[Message]) -> list[int]:
    """The ids that the assistant's answer follows, generation prompt included. UnfitError if there are none.

    If the template rewrites earlier answers, its whole text is tokenized at once: nothing has to match it here.
    """
    try:
        return _encode_turns(codec, messages)[0]
    except TemplateRewriteError:
        return tokenize(codec, render(codec, messages))


def encode_response(codec: Codec, text: str) -> list[int]:
    """The ids of an answer and the end-of-turn id. UnfitError if the text itself holds an EOS token."""
    ids = tokenize(codec, text)
    if not set(ids).isdisjoint(codec.eos_ids):
        raise UnfitError("end token in response", "response", f"the text spells out one of {codec.eos_ids}")
    return [*ids, codec.end_of_turn_id]


def decode_response(codec: Codec, ids: Sequence[int]) -> str:
    """The text of an answer, special tokens left out."""
    return cast(str, codec.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def encode_conversation(codec: Codec, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
    """(ids, is_response) of a conversation that ends with an answer: the last id is its end-of-turn id.

    `is_response` is True on the tokens of every answer and on the end-of-turn id after it. UnfitError if the
    template refuses the conversation or rewrites earlier turns: then no one sequence shows what a policy would see.
    """
    ids, is_response = _encode_turns(codec, messages[:-1])
    response = encode_response(codec, messages[-1].content)
    return ids + response, is_response + [True] * len(response)


def encode_demonstrations(
    codec: Codec,
    records: Sequence[Demonstration | PlainText],
    *,
    max_length: int,
    on_progress: OnProgress = _silently,
) -> tuple[list[TokenizedDemonstration], list[Reject]]:
    """Over `max_length` a demonstration is cut from the left, never in its last answer, which needs an id before it.

    Plain text is learnt whole, up to the EOS after it, in as many rows of `max_length` as it needs.
    """

    def encode(record: Demonstration | PlainText) -> list[TokenizedDemonstration]:
        if isinstance(record, PlainText):
            return _encode_text(codec, record.text, max_length)
        ids, is_response = encode_conversation(codec, record.messages)
        length = is_response[::-1].index(False) if False in is_response else len(ids)
        _check_length(length, max_length, "messages")
        num_cut = max(0, len(ids) - max_length)
        return [TokenizedDemonstration(tuple(ids[num_cut:]), tuple(is_response[num_cut:]), num_cut)]

    kept, rejects = _encode_all(records, encode, on_progress)
    return [row for rows in kept for row in rows], rejects


def encode_comparisons(
    codec: Codec, records: Sequence[Comparison], *, max_length: int, on_progress: OnProgress = _silently
) -> tuple[list[TokenizedComparison], list[Reject]]:
    """Over `max_length` the prompt is cut from the left, for both sides as the longer one needs, to one id at least."""

    def encode(record: Comparison) -> TokenizedComparison:
        chosen, rejected = encode_response(codec, record.chosen), encode_response(codec, record.rejected)
        for field, side in (("chosen", chosen), ("rejected", rejected)):
            _check_length(len(side), max_length, field)
        if chosen == rejected:
            raise UnfitError("identical after truncation", "rejected", f"both are the same {len(chosen)} tokens")
        prompt = encode_prompt(codec, record.prompt)
        num_cut = max(0, len(prompt) + max(len(chosen), len(rejected)) - max_length)
        ids = tuple(prompt[num_cut:]), tuple(chosen), tuple(rejected)
        return TokenizedComparison(*ids, record.margin, record.preference, record.source, num_cut)

    return _encode_all(records, encode, on_progress)


def encode_verdicts(
    codec: Codec, records: Sequence[Verdict], *, max_length: int, on_progress: OnProgress = _silently
) -> tuple[list[TokenizedVerdict], list[Reject]]:
    """Over `max_length` the prompt is cut from the left, to one id at least."""

    def encode(record: Verdict) -> TokenizedVerdict:
        response = encode_response(codec, record.response)
        _check_length(len(response), max_length, "completion")
        prompt = encode_prompt(codec, record.prompt)
        num_cut = max(0, len(prompt) + len(response) - max_length)
        return TokenizedVerdict(tuple(prompt[num_cut:]), tuple(response), record.is_good, record.source, num_cut)

    return _encode_all(records, encode, on_progress)


def encode_prompts(
    codec: Codec, prompts: Sequence[Prompt], *, max_prompt_length: int, on_progress: OnProgress = _silently
) -> tuple[list[TokenizedPrompt], list[Reject]]:
    """A prompt over `max_prompt_length` is rejected, not cut."""

    def encode(prompt: Prompt) -> TokenizedPrompt:
        ids = encode_prompt(codec, prompt.messages)
        if len(ids) > max_prompt_length:
            raise UnfitError("prompt over length", "prompt", f"{len(ids)} tokens, over {max_prompt_length}")
        return TokenizedPrompt(tuple(ids), prompt.messages, prompt.source)

    return _encode_all(prompts, encode, on_progress)


def _encode_all(
    records: Sequence[RecordT], encode: Callable[[RecordT], TokenizedT], on_progress: OnProgress
) -> tuple[list[TokenizedT], list[Reject]]:
    kept: list[TokenizedT] = []
    rejects: list[Reject] = []
    on_progress(0, len(records))
    for done, record in enumerate(records, start=1):
        try:
            kept.append(encode(record))
        except UnfitError as unfit:
            rejects.append(unfit.reject(record.source))
        if done % 256 == 0 or done == len(records):
            on_progress(done, len(records))
    return kept, rejects


def _encode_text(codec: Codec, text: str, max_length: int) -> list[TokenizedDemonstration]:
    """Every token is learnt but a row's first, which nothing predicts; a tokenizer that puts a BOS first does so."""
    ids = [*cast(list[int], codec.tokenizer(text)["input_ids"])]
    while ids and ids[-1] in codec.eos_ids:  # some tokenizers add it themselves
        ids.pop()
    eos_id = cast("int | None", codec.tokenizer.eos_token_id)
    ids.append(codec.end_of_turn_id if eos_id is None else eos_id)
    pieces = [tuple(ids[start : start + max_length]) for start in range(0, len(ids), max_length)]
    if len(pieces) > 1 and len(pieces[-1]) == 1:  # a lone last token has none before it in its row
        pieces[-2:] = [pieces[-2][:-1], (pieces[-2][-1], *pieces[-1])]
    return [TokenizedDemonstration(piece, (False, *(True for _ in piece[1:]))) for piece in pieces]


def _check_length(length: int, max_length: int, field: str) -> None:
    if length >= max_length:  # one id must be left before a response, or nothing predicts its first token
        raise UnfitError("response over length", field, f"{length} tokens, over {max_length - 1}")


def _encode_turns(codec: Codec, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
    """(ids, is_response) of turns that end with the user's, generation prompt included."""
    answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
    openings = [render(codec, messages[:end]) for end in [*answers, len(messages)]]
    ids = tokenize(codec, openings[0])
    is_response = [False] * len(ids)
    for index, before, after in zip(answers, openings, openings[1:], strict=False):
        answer = messages[index].content
        start, stop = _find_answer(before, after, answer)
        lead, gap = tokenize(codec, after[len(before) : start]), tokenize(codec, after[stop:])
        content = encode_response(codec, answer)[:-1]
        ids += [*lead, *content, *gap]
        is_response += [False] * len(lead) + [True] * len(content) + _marked_end_of_turn(codec, gap)
    return ids, is_response


def _find_answer(before: str, after: str, answer: str) -> tuple[int, int]:
    """Where in `after`, the text up to the next answer, `answer` stands; `before` is the text up to it."""
    written = after.removeprefix(before)
    if after.startswith(before):
        if written.startswith(answer):
            return len(before), len(before) + len(answer)
        bare, lead = answer.strip(), len(written) - len(written.lstrip())
        if written[lead:].startswith(bare):  # templates that trim answers, or put a space before them
            return len(before) + lead, len(before) + lead + len(bare)
    raise TemplateRewriteError("template rewrites earlier turns", "messages", f"near {answer[:40]!r}")


def _marked_end_of_turn(codec: Codec, gap: list[int]) -> list[bool]:
    """True on the end-of-turn id that `gap`, the text between an answer and the next turn, begins with."""
    end = gap.index(codec.end_of_turn_id) if codec.end_of_turn_id in gap else None
    if end is not None and str(codec.tokenizer.decode(gap[:end])).strip():
        end = None  # it closes a later turn
    return [position == end for position in range(len(gap))]


def render(codec: Codec, messages: Sequence[Message], *, is_open: bool = True) -> str:
    """The template's text; `is_open`: it ends where the assistant's answer starts."""
    if codec.system_prompt is not None and (not messages or messages[0].role != "system"):
        messages = [Message("system", codec.system_prompt), *messages]
    turns = [{"role": message.role, "content": message.content} for message in messages]
    try:
        text = codec.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=is_open)
    except jinja2.TemplateError as error:
        raise UnfitError("template refuses row", "messages", str(error)) from error
    return cast(str, text)


def tokenize(codec: Codec, text: str) -> list[int]:
    # The template writes BOS and EOS itself; the tokenizer must not add its own.
    return cast(list[int], codec.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []
