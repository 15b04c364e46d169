"""Several answers to one prompt, ranked or rated: OpenAssistant's trees, UltraFeedback, OpenAI's summaries."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

from data.formats import Row, as_text, present, shorten, typed
from data.ingestion.flat import as_number
from data.records import UnfitError

_OASST_ROLES: Mapping[object, str] = {"prompter": "user", "assistant": "assistant"}


@dataclass(frozen=True)
class _Node:
    """A message of a tree. `before` is the node that it replies to."""

    role: str
    text: str
    rank: float | None
    replies: list[object]
    before: "_Node | None"


def oasst_trees(row: Row) -> list[dict[str, object]]:
    """One pair for each two neighbours in the ranking of a prompter's replies (rank 0 is best).

    Neighbours only: all pairs of k replies would be k(k-1)/2, and count the prompts with many replies too often.
    Deleted replies are left out with all that follows them, unranked ones are in no pair; nor are equal ranks.
    """
    pairs: list[dict[str, object]] = []
    open_nodes = [_node(present(row, "prompt"), None)]
    while open_nodes:  # a loop, since trees may be deeper than the stack
        node = open_nodes.pop()
        if node is None:
            continue
        replies = [_node(reply, node) for reply in node.replies]
        open_nodes += reversed(replies)
        if node.role == "user":
            pairs += _ranked_pairs(node, replies)
    if not pairs:
        raise UnfitError("no ranked answers", "prompt", "no two replies with different ranks")
    return pairs


def ultrafeedback(row: Row) -> list[dict[str, object]]:
    """The best-rated completion against the lowest-rated one; `margin` is the difference of their ratings.

    The usual binarised copies take a random other one for the worse side; ours gives the same pair every time. Among
    equals the first counts. If all are equal, the first two are a tie. Ratings are of one scale: `overall_score`,
    `fine-grained_score` or the mean rating of the annotations, whichever is the first that two completions have.
    """
    completions = typed(present(row, "completions"), list, "completions", "not a list")
    answers: list[Row] = [item for item in completions if isinstance(item, dict)]
    scales = ([(scale(answer), answer) for answer in answers] for scale in _SCALES)
    known = ([(rating, answer) for rating, answer in scale if rating is not None] for scale in scales)
    rated = next((scale for scale in known if len(scale) > 1), None)
    if rated is None:
        raise UnfitError("no ratings", "completions", f"{len(answers)} completions, of which no two have a rating")
    best, worst = max(rated, key=lambda pair: pair[0]), min(rated, key=lambda pair: pair[0])
    is_tie = best[0] == worst[0]
    if is_tie:
        best, worst = rated[:2]
    return [
        {
            "prompt": as_text(present(row, "instruction"), "instruction"),
            "chosen": as_text(present(best[1], "response"), "response"),
            "rejected": as_text(present(worst[1], "response"), "response"),
            **({"preference": 0.5} if is_tie else {"margin": best[0] - worst[0]}),
        }
    ]


def summarize_from_feedback(row: Row) -> list[dict[str, object]]:
    """The post, or the article, and "TL;DR:" ask for a summary; title and subreddit are left out."""
    info, summaries, choice = present(row, "info"), present(row, "summaries"), present(row, "choice")
    told: Row = typed(info, dict, "info", "not an object with post or article")
    if not isinstance(summaries, list) or len(cast(list[object], summaries)) != 2:
        raise UnfitError("malformed", "summaries", f"{shorten(summaries)}, not two summaries")
    if type(choice) is not int or choice not in (0, 1):
        raise UnfitError("wrong type", "choice", f"{shorten(choice)}, not 0 or 1")
    asked = as_text(present(told, "article" if told.get("post") is None else "post"), "info")
    texts = [_summary(item, f"summaries[{index}]") for index, item in enumerate(cast(list[object], summaries))]
    chosen, rejected = reversed(texts) if choice == 1 else texts
    prompt = f"{asked.strip()}\n\nTL;DR:" if asked.strip() else ""
    return [{"prompt": prompt, "chosen": chosen, "rejected": rejected}]


def _node(item: object, before: _Node | None) -> _Node | None:
    """None for what is deleted or no message."""
    if not isinstance(item, dict):
        return None
    message = cast(Row, item)
    role, text, replies = message.get("role"), message.get("text"), message.get("replies")
    if not isinstance(role, str) or role not in _OASST_ROLES or not isinstance(text, str) or message.get("deleted"):
        return None
    listed = cast(list[object], replies) if isinstance(replies, list) else []
    return _Node(_OASST_ROLES[role], text, _finite(message.get("rank")), listed, before)


def _ranked_pairs(asked: _Node, replies: Sequence[_Node | None]) -> list[dict[str, object]]:
    answers = [reply for reply in replies if reply is not None and reply.role == "assistant"]
    ranked = sorted(
        ((answer.rank, answer.text) for answer in answers if answer.rank is not None), key=lambda pair: pair[0]
    )
    better = [(first, second) for first, second in pairwise(ranked) if first[0] < second[0]]
    prompt = _messages_to(asked) if better else []
    return [{"prompt": prompt, "chosen": first[1], "rejected": second[1]} for first, second in better]


def _messages_to(last: _Node) -> list[dict[str, object]]:
    messages: list[dict[str, object]] = []
    node: _Node | None = last
    while node is not None:
        messages.append({"role": node.role, "content": node.text})
        node = node.before
    return messages[::-1]


def _mean_rating(completion: Row) -> float | None:
    """The mean over the aspects annotated; some have the rating "N/A"."""
    annotations = completion.get("annotations")
    if not isinstance(annotations, dict):
        return None
    aspects = cast(Mapping[str, object], annotations).values()
    ratings = [_finite(cast(Row, aspect).get("Rating")) for aspect in aspects if isinstance(aspect, dict)]
    known = [rating for rating in ratings if rating is not None]
    return sum(known) / len(known) if known else None


_SCALES: tuple[Callable[[Row], float | None], ...] = (
    lambda completion: _finite(completion.get("overall_score")),
    lambda completion: _finite(completion.get("fine-grained_score")),
    _mean_rating,
)


def _finite(value: object) -> float | None:
    """The number in `value`, a string or not; None if there is none."""
    try:
        number = as_number(value, "")
    except UnfitError:
        return None
    return number if number is not None and math.isfinite(number) else None


def _summary(item: object, field: str) -> str:
    summary: Row = typed(item, dict, field, "not an object with text")
    return as_text(present(summary, "text"), field).strip()
