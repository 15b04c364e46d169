"""The records that every data source is turned into: one frozen type for each kind of row.

A prompt is a tuple of messages that ends with a user's turn; a string prompt in a file becomes one user message.
`source` says where a row came from ("file.jsonl:12"), so that any later rejection can name it.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Role = Literal["system", "user", "assistant"]
RecordKind = Literal["demonstration", "comparison", "verdict", "prompt"]


@dataclass(frozen=True)
class Message:
    role: Role
    content: str


@dataclass(frozen=True)
class Demonstration:
    """A conversation to imitate: every assistant turn in it is learnt, the last message is one."""

    messages: tuple[Message, ...]
    source: str


@dataclass(frozen=True)
class Comparison:
    """One prompt and two responses, of which `chosen` was preferred."""

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    source: str
    margin: float | None = None  # by how much at least `chosen` is better, in units of the score
    preference: float = 1.0  # the probability that `chosen` is preferred; 0.5 is a tie


@dataclass(frozen=True)
class Verdict:
    """One prompt, one response, and whether a person found it good: that it keeps the norms, for example."""

    prompt: tuple[Message, ...]
    response: str
    is_good: bool
    source: str


@dataclass(frozen=True)
class Prompt:
    """A conversation that waits for the assistant's answer."""

    messages: tuple[Message, ...]
    source: str


@dataclass(frozen=True)
class PlainText:
    """Text without turns."""

    text: str
    source: str


Record = Demonstration | Comparison | Verdict | Prompt | PlainText


def parts_of(record: Record) -> tuple[tuple[Message, ...], dict[str, str]]:
    """(messages, texts by name): the turns that the template writes, all of a demonstration's, and what stands beside
    them, all of which is learnt or scored: both responses, the response, or the plain text."""
    match record:
        case Comparison(prompt, chosen, rejected):
            return prompt, {"chosen": chosen, "rejected": rejected}
        case Verdict(prompt, response):
            return prompt, {"response": response}
        case Demonstration(messages) | Prompt(messages):
            return messages, {}
        case PlainText(text):
            return (), {"text": text}


@dataclass(frozen=True)
class Reject:
    """A row that was set aside: `reason` is a short fixed phrase (counted), `detail` says what was seen."""

    source: str
    reason: str
    field: str
    detail: str


class UnfitError(Exception):
    """Why a row is no record, or a record cannot become token ids. It ends as a Reject."""

    def __init__(self, reason: str, field: str, detail: str) -> None:
        super().__init__(reason, field, detail)
        self.reason, self.field, self.detail = reason, field, detail

    def reject(self, source: str) -> Reject:
        return Reject(source, self.reason, self.field, self.detail)


@dataclass(frozen=True)
class Account:
    """rows_in = kept + the sum of rejected; `rejected` maps reason to count, sorted by reason. `cut` of those kept lost
    their beginning to a stage's length."""

    rows_in: int
    kept: int
    rejected: tuple[tuple[str, int], ...]
    cut: int = 0

    @property
    def num_rejected(self) -> int:
        return sum(count for _, count in self.rejected)

    @staticmethod
    def of(rows_in: int, rejects: "Sequence[Reject]", *, cut: int = 0) -> "Account":
        counts = Counter(reject.reason for reject in rejects)
        return Account(rows_in, rows_in - len(rejects), tuple(sorted(counts.items())), cut)

    def __add__(self, other: "Account") -> "Account":
        """Both together: of two sources or splits."""
        counts = Counter(dict(self.rejected)) + Counter(dict(other.rejected))
        rejected = tuple(sorted(counts.items()))
        return Account(self.rows_in + other.rows_in, self.kept + other.kept, rejected, self.cut + other.cut)
