"""The raw formats that we know, called shapes: how each is recognised, and the canonical rows it becomes.

A shape is recognised by a row's keys and the types of their values; a null is no value: Parquet fills with them. The
shapes exclude each other. A row that judges an answer is never a demonstration, nor a prompt: a format that we do not
know is better refused than half of it learnt.

A canonical row is what data.formats.parse_row takes; it checks types, turns and empty texts, so `convert` leaves that
to it. `convert` raises UnfitError for a row that it can make nothing of, and nothing else, whatever the row holds.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import UnionType
from typing import cast

from align.errors import DataError
from data.formats import Row
from data.ingestion import chats, flat, rankings, transcripts
from data.records import RecordKind

ROWS_LOOKED_AT = 100
_KEYS_SHOWN = 30


@dataclass(frozen=True)
class Shape:
    """A raw format. Picklable, since shapes travel to worker processes: the functions are a module's own."""

    name: str  # what --format takes
    kind: RecordKind
    looks_like: str  # for messages and the README
    convert: Callable[[Row], list[dict[str, object]]]  # a raw row to canonical ones, one or more; or UnfitError
    has: Mapping[str, type | UnionType]  # the keys that a row must have, and what their values are
    any_of: tuple[str, ...] = ()  # of these keys one at least
    lacks: tuple[str, ...] = ()
    is_own: Callable[[Row], bool] | None = None  # what else tells it from the others

    def matches(self, row: Row) -> bool:
        found = {key for key, value in row.items() if value is not None}
        return (
            all(key in found and isinstance(row[key], of) for key, of in self.has.items())
            and (not self.any_of or not found.isdisjoint(self.any_of))
            and found.isdisjoint(self.lacks)
            and (self.is_own is None or self.is_own(row))
        )


def detect(rows: Sequence[Row], *, where: str) -> Shape:
    """The shape that most of the first 100 rows have. DataError if none has one, or if two shapes are at par."""
    looked_at = rows[:ROWS_LOOKED_AT]
    counts = Counter(name for row in looked_at for name, shape in SHAPES.items() if shape.matches(row))
    best = [name for name, count in counts.items() if count == max(counts.values())]
    if len(best) == 1:
        return SHAPES[best[0]]
    found = list(dict.fromkeys(key for row in looked_at for key in row))
    keys = ", ".join(found[:_KEYS_SHOWN] + ["…"] * (len(found) > _KEYS_SHOWN)) or "none"
    known = "".join(f"\n  {name}: {shape.looks_like}" for name, shape in SHAPES.items())
    if best:
        what = f"the rows have several shapes, {' and '.join(best)}, on {counts[best[0]]} of {len(looked_at)} rows each"
    else:
        what = f"none of the first {len(looked_at)} rows has a shape that is known"
    remedy = "Name the shape with --format NAME, or the columns with --map prompt=COLUMN,chosen=COLUMN,…"
    raise DataError(f"{where}: {what}. Keys found: {keys}. {remedy}. Shapes known:{known}")


def mapped(columns: Mapping[str, str]) -> Shape:
    """The shape of flat rows whose columns the user names: target to raw column, or to several ("a+b") for a prompt.

    Targets: those of a canonical row, or for a pair in no order `first` and `second` with `better` (0 or the first's
    column, 1 or the second's, tie) or `first_is_better`. DataError for a set of targets not in flat.TARGETS.
    """
    given = set(columns)
    kinds: list[RecordKind] = [kind for needed, optional, kind in flat.TARGETS if needed <= given <= needed | optional]
    if not kinds:
        raise DataError(f"--map names {_listed(given) or 'nothing'}; it takes one of: {_known_targets()}")
    for target, source in columns.items():
        parts = flat.split_columns(source)
        if not all(parts) or (len(parts) > 1 and target != "prompt"):
            raise DataError(f"--map {target}={source}: wanted one column (a prompt may have several: a+b)")
    named = {target: "+".join(flat.split_columns(source)) for target, source in columns.items()}
    looks_like = ", ".join(f"{target}={source}" for target, source in named.items())
    return Shape("mapped", kinds[0], looks_like, partial(flat.from_columns, named), {})


def _known_targets() -> str:
    options = (_listed(needed) + (f" (and {_listed(more)})" if more else "") for needed, more, _ in flat.TARGETS)
    return "; ".join(options)


def _listed(targets: set[str] | frozenset[str]) -> str:
    return ", ".join(sorted(targets))


_JUDGED = ("chosen", "rejected", "rejected_response", "rejected_messages", "label", "kto_tag", *flat.MARKS)
_BESIDE_MESSAGES = (*_JUDGED, "completion")
_STRUCTURED = ("prompt", "messages", "conversations", "instruction", "completion", "chosen", "rejected", "info", "role")
# Key parts that say that a row beside its prompt holds more than we would take from it.
_ANSWER_WORDS = ("better", "chosen", "completion", "label", "output", "preference", "preferred", "reject", "respon")


def _is_no_other_pair(row: Row) -> bool:
    return not (SHAPES["hh-rlhf"].matches(row) or SHAPES["alpaca-preference"].matches(row))


def _has_ranked_output(row: Row) -> bool:
    has_sides = row.get("chosen") is not None and row.get("rejected") is not None
    return has_sides or isinstance(row.get("output"), list)


def _is_judged_in_words(row: Row) -> bool:
    return flat.has_verdict(row) and not SHAPES["trl-unpaired"].matches(row)


def _ends_with_user(row: Row) -> bool:
    messages = cast(list[object], row["messages"])
    last = messages[-1] if messages else None
    return isinstance(last, dict) and cast(Row, last).get("role") == "user"


def _ends_with_answer(row: Row) -> bool:
    return not _ends_with_user(row)


def _is_prompt_alone(row: Row) -> bool:
    found = {key for key, value in row.items() if value is not None}
    if "messages" in found:
        return isinstance(row["messages"], list) and found.isdisjoint(_BESIDE_MESSAGES) and _ends_with_user(row)
    holds_more = any(word in key.lower() for key in found for word in _ANSWER_WORDS)
    is_chat = not found.isdisjoint(("conversations", "instruction", "text"))
    return isinstance(row.get("prompt"), str | list) and not holds_more and not is_chat


_ALL: tuple[Shape, ...] = (
    Shape(
        "trl-preference",
        "comparison",
        "chosen + rejected, strings or messages; also prompt, margin, preference",
        partial(chats.picked, columns=("prompt", "chosen", "rejected", "margin", "preference")),
        {"chosen": str | list, "rejected": str | list},
        lacks=("conversations",),
        is_own=_is_no_other_pair,
    ),
    Shape(
        "hh-rlhf",
        "comparison",
        r"chosen + rejected, transcripts with \n\nHuman: and \n\nAssistant:",
        transcripts.hh_rlhf,
        {"chosen": str, "rejected": str},
        is_own=transcripts.is_pair,
    ),
    Shape(
        "openai-preference",
        "comparison",
        "input.messages + preferred_output + non_preferred_output",
        chats.openai_preference,
        {"input": dict},
        any_of=("preferred_output", "non_preferred_output"),
    ),
    Shape(
        "sharegpt-preference",
        "comparison",
        "conversations + chosen + rejected, messages of from + value",
        chats.sharegpt_preference,
        {"conversations": list, "chosen": object, "rejected": object},
    ),
    Shape(
        "alpaca-preference",
        "comparison",
        "instruction + chosen + rejected, or output as [better, worse]; also input, system, history",
        chats.alpaca_preference,
        {"instruction": str},
        lacks=("prompt", "completions", "conversations"),
        is_own=_has_ranked_output,
    ),
    Shape(
        "oasst-trees",
        "comparison",
        "message_tree_id + prompt, a tree of replies with ranks",
        rankings.oasst_trees,
        {"message_tree_id": object, "prompt": dict},
    ),
    Shape(
        "ultrafeedback",
        "comparison",
        "instruction + completions, a list of rated responses",
        rankings.ultrafeedback,
        {"instruction": str, "completions": list},
    ),
    Shape(
        "summarize-from-feedback",
        "comparison",
        "info.post or info.article + summaries + choice",
        rankings.summarize_from_feedback,
        {"info": dict, "summaries": list},
    ),
    Shape(
        "trl-unpaired",
        "verdict",
        "prompt + completion + label, true or false",
        partial(chats.picked, columns=("prompt", "completion", "label")),
        {"prompt": object, "completion": object, "label": bool},
    ),
    Shape(
        "thumbs",
        "verdict",
        "prompt + completion or response + label, thumbs, feedback or is_good: 0, 1, up, down, good, bad",
        flat.thumbs,
        {"prompt": object},
        any_of=("completion", "response"),
        is_own=_is_judged_in_words,
    ),
    Shape(
        "trl-messages",
        "demonstration",
        "messages of role + content (OpenAI's chat format too), the assistant's last",
        chats.trl_messages,
        {"messages": list},
        lacks=_BESIDE_MESSAGES,
        is_own=_ends_with_answer,
    ),
    Shape(
        "trl-prompt-completion",
        "demonstration",
        "prompt + completion, strings or messages",
        partial(chats.picked, columns=("prompt", "completion")),
        {"prompt": object, "completion": object},
        lacks=_JUDGED,
    ),
    Shape(
        "sharegpt",
        "demonstration",
        "conversations, messages of from (human, gpt, system) + value",
        chats.sharegpt,
        {"conversations": list},
        lacks=_JUDGED,
    ),
    Shape(
        "alpaca",
        "demonstration",
        "instruction + output; also input, system, history",
        chats.alpaca,
        {"instruction": str, "output": str},
        lacks=(*_JUDGED, "prompt", "completions", "messages", "conversations"),
    ),
    Shape(
        "text",
        "demonstration",
        "text, without turns",
        partial(chats.picked, columns=("text",)),
        {"text": str},
        lacks=_STRUCTURED,
    ),
    Shape(
        "trl-prompt",
        "prompt",
        "prompt, string or messages, and no answer; or messages, the user's last",
        chats.trl_prompt,
        {},
        is_own=_is_prompt_alone,
    ),
)
SHAPES: Mapping[str, Shape] = {shape.name: shape for shape in _ALL}
