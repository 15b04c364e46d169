"""The raw formats that we know, called shapes: how each is recognised, and the canonical rows it becomes.

A canonical row is what data.formats.parse_row takes; it checks types, turns and empty texts, so `convert` leaves that
to it. `convert` raises UnfitError for a row that it can make nothing of, and nothing else, whatever the row holds.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from align.errors import DataError
from data.formats import Row
from data.ingestion import chats, flat, rankings, recognition, transcripts
from data.records import RecordKind

ROWS_LOOKED_AT = 100
_KEYS_SHOWN = 30


@dataclass(frozen=True)
class Shape:
    """A raw format. Picklable, since shapes travel to worker processes: the functions are a module's own."""

    name: str  # what --format takes
    kind: RecordKind
    looks_like: str  # for messages and the README
    matches: Callable[[Row], bool]
    convert: Callable[[Row], list[dict[str, object]]]  # a raw row to canonical ones, one or more; or UnfitError


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
    matches, convert = partial(flat.has_columns, named), partial(flat.from_columns, named)
    return Shape("mapped", kinds[0], looks_like, matches, convert)


def _known_targets() -> str:
    options = (_listed(needed) + (f" (and {_listed(more)})" if more else "") for needed, more, _ in flat.TARGETS)
    return "; ".join(options)


def _listed(targets: set[str] | frozenset[str]) -> str:
    return ", ".join(sorted(targets))


_ALL: tuple[Shape, ...] = (
    Shape(
        "trl-preference",
        "comparison",
        "chosen + rejected, strings or messages; also prompt, margin, preference",
        recognition.is_trl_preference,
        chats.trl_preference,
    ),
    Shape(
        "hh-rlhf",
        "comparison",
        r"chosen + rejected, transcripts with \n\nHuman: and \n\nAssistant:",
        recognition.is_hh_rlhf,
        transcripts.hh_rlhf,
    ),
    Shape(
        "openai-preference",
        "comparison",
        "input.messages + preferred_output + non_preferred_output",
        recognition.is_openai_preference,
        chats.openai_preference,
    ),
    Shape(
        "sharegpt-preference",
        "comparison",
        "conversations + chosen + rejected, messages of from + value",
        recognition.is_sharegpt_preference,
        chats.sharegpt_preference,
    ),
    Shape(
        "alpaca-preference",
        "comparison",
        "instruction + chosen + rejected, or output as [better, worse]; also input, system, history",
        recognition.is_alpaca_preference,
        chats.alpaca_preference,
    ),
    Shape(
        "oasst-trees",
        "comparison",
        "message_tree_id + prompt, a tree of replies with ranks",
        recognition.is_oasst_trees,
        rankings.oasst_trees,
    ),
    Shape(
        "ultrafeedback",
        "comparison",
        "instruction + completions, a list of rated responses",
        recognition.is_ultrafeedback,
        rankings.ultrafeedback,
    ),
    Shape(
        "summarize-from-feedback",
        "comparison",
        "info.post or info.article + summaries + choice",
        recognition.is_summarize_from_feedback,
        rankings.summarize_from_feedback,
    ),
    Shape(
        "trl-unpaired",
        "verdict",
        "prompt + completion + label, true or false",
        recognition.is_trl_unpaired,
        chats.trl_unpaired,
    ),
    Shape(
        "thumbs",
        "verdict",
        "prompt + completion or response + label, thumbs, feedback or is_good: 0, 1, up, down, good, bad",
        recognition.is_thumbs,
        flat.thumbs,
    ),
    Shape(
        "trl-messages",
        "demonstration",
        "messages of role + content (OpenAI's chat format too), the assistant's last",
        recognition.is_trl_messages,
        chats.trl_messages,
    ),
    Shape(
        "trl-prompt-completion",
        "demonstration",
        "prompt + completion, strings or messages",
        recognition.is_trl_prompt_completion,
        chats.trl_prompt_completion,
    ),
    Shape(
        "sharegpt",
        "demonstration",
        "conversations, messages of from (human, gpt, system) + value",
        recognition.is_sharegpt,
        chats.sharegpt,
    ),
    Shape(
        "alpaca",
        "demonstration",
        "instruction + output; also input, system, history",
        recognition.is_alpaca,
        chats.alpaca,
    ),
    Shape("text", "demonstration", "text, without turns", recognition.is_text, chats.text),
    Shape(
        "trl-prompt",
        "prompt",
        "prompt, string or messages, and no answer; or messages, the user's last",
        recognition.is_trl_prompt,
        chats.trl_prompt,
    ),
)
SHAPES: Mapping[str, Shape] = {shape.name: shape for shape in _ALL}
