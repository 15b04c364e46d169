"""What the pipeline needs to know of a tokenizer, settled once: which ids end a turn, and which pads."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from align.errors import ModelError
from data.records import Message, UnfitError
from data.template import DEFAULT_CHAT_TEMPLATE
from data.tokenization import Codec, render, tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = "align probe"
_NUL_TOKENS = ("Ā", "<0x00>")  # the byte 0 in byte-level and byte-fallback vocabularies


def make_codec(tokenizer: "PreTrainedTokenizerBase", *, eos_ids: Sequence[int], system_prompt: str | None) -> Codec:
    """`eos_ids`: those of generation config, config and tokenizer together; the end-of-turn id joins them.

    Sets the tokenizer's `chat_template`, if it has none, and its `pad_token`, so that trainers that read them from
    the tokenizer agree. ModelError if there is no EOS token, or if the template refuses or leaves out the system
    prompt.
    """
    if not tokenizer.chat_template:
        tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE
    default_id = cast("int | None", tokenizer.eos_token_id)
    stops = list(dict.fromkeys(eos_ids if default_id is None else [*eos_ids, default_id]))
    if not stops:
        raise ModelError("the tokenizer has no EOS token, so no response could end; set its eos_token")
    default_id = stops[0] if default_id is None else default_id
    end_of_turn_id = _find_end_of_turn(Codec(tokenizer, tuple(stops), default_id, -1, system_prompt))
    stops += [end_of_turn_id] if end_of_turn_id not in stops else []
    pad_id = _find_pad(tokenizer, stops)
    tokenizer.pad_token = cast(str, tokenizer.convert_ids_to_tokens(pad_id))
    return Codec(tokenizer, tuple(stops), end_of_turn_id, pad_id, system_prompt)


def _find_end_of_turn(codec: Codec) -> int:
    """The first special token that the template writes after an answer, or else the codec's."""
    try:
        text = render(codec, [Message("user", "a"), Message("assistant", _PROBE)], is_open=False)
    except UnfitError as error:
        what = "a user's and an assistant's turn" if codec.system_prompt is None else "data.system_prompt"
        raise ModelError(f"the model's chat template refuses {what}: {error.detail}") from error
    if codec.system_prompt is not None and codec.system_prompt.strip() not in text:
        raise ModelError("the model's chat template leaves system messages out; remove data.system_prompt")
    after = tokenize(codec, text.rpartition(_PROBE)[2]) if _PROBE in text else []
    ends = {*_special_ids(codec.tokenizer), *codec.eos_ids}
    return next((token_id for token_id in after if token_id in ends), codec.end_of_turn_id)


def _find_pad(tokenizer: "PreTrainedTokenizerBase", eos_ids: Sequence[int]) -> int:
    """The tokenizer's pad id, unless it is an EOS id: as padding that would mask the token that ends a response."""
    tokens = {token_id: str(tokenizer.convert_ids_to_tokens(token_id)) for token_id in _special_ids(tokenizer)}
    named = [cast("int | None", tokenizer.pad_token_id), cast("int | None", tokenizer.unk_token_id)]
    special = sorted(tokens, key=lambda token_id: ("pad" not in tokens[token_id].lower(), token_id))
    # Failing these, any id is safe, since all masks come from lengths. But pad_token would be saved as special and
    # vanish from decoded text, so rather the byte 0 than a letter.
    nul = [cast(int, tokenizer.convert_tokens_to_ids(token)) for token in _NUL_TOKENS if token in tokenizer.get_vocab()]
    candidates = [*named, *special, *nul, *range(len(eos_ids) + 1)]
    return next(token_id for token_id in candidates if token_id is not None and token_id not in eos_ids)


def _special_ids(tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    added = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)
