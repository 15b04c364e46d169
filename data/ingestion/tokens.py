"""Rows whose tokens would not fit where they are to be trained on. Asked only where bytes cannot tell."""

from functools import cache

from data.ingestion.rules import TokenRule
from data.records import Comparison, Demonstration, PlainText, Prompt, Record, Reject, Verdict, parts_of
from data.tokenization import Codec, encode_comparisons, encode_demonstrations, encode_prompts, encode_verdicts

_BYTES_PER_TURN = 64  # more than any template known writes around a turn


@cache
def _codec_of(rule: TokenRule) -> Codec:
    """One tokenizer a process, whichever pieces come to it: the rule is pickled anew with each."""
    return rule.load_codec(rule.tokenizer, rule.system_prompt)


class TokenGate:
    """The very functions that the stages tokenize with say what would be set aside."""

    def __init__(self, rule: TokenRule) -> None:
        self._codec = _codec_of(rule)
        self._max_length = rule.max_length
        tokenizer = self._codec.tokenizer
        self._ends = tuple(str(tokenizer.convert_ids_to_tokens(eos_id)) for eos_id in self._codec.eos_ids)
        self._accepted: set[tuple[str, ...]] = set()  # the orders of roles that the template has taken

    def reject(self, record: Record) -> Reject | None:
        roles = tuple(message.role for message in parts_of(record)[0])
        # Some templates rewrite earlier answers, by what is said in them
        may_be_rewritten = isinstance(record, Demonstration) and "assistant" in roles[:-1]
        if roles in self._accepted and not may_be_rewritten and self._fits_surely(record):
            return None
        reject = self._encode(record)
        if reject is None:
            self._accepted.add(roles)
        return reject

    def _encode(self, record: Record) -> Reject | None:
        codec, length = self._codec, self._max_length
        match record:
            case Comparison():
                _, rejects = encode_comparisons(codec, [record], max_length=length)
            case Verdict():
                _, rejects = encode_verdicts(codec, [record], max_length=length)
            case Prompt():
                _, rejects = encode_prompts(codec, [record], max_prompt_length=length)
            case Demonstration() | PlainText():
                _, rejects = encode_demonstrations(codec, [record], max_length=length)
        return rejects[0] if rejects else None

    def _fits_surely(self, record: Record) -> bool:
        """No token is shorter than a byte. A text that spells out an end token is looked at in any case."""
        messages, texts = parts_of(record)
        prompt = "".join([self._codec.system_prompt or "", *(message.content for message in messages)])
        match record:
            case Comparison() | Verdict():
                counted = list(texts.values())
            case Demonstration():  # cut from the left, so that the last answer decides
                counted = [messages[-1].content]
            case Prompt():
                counted = [prompt + " " * _BYTES_PER_TURN * (len(messages) + 2)]
            case PlainText():
                return True  # cut into as many rows as it needs
        if any(end in text for end in self._ends for text in (prompt, *counted)):
            return False
        return max(len(text.encode()) for text in counted) + _BYTES_PER_TURN < self._max_length
