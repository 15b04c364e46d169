"""The gold score of the quickstart's task: a known ground truth, so that over-optimisation of the reward model shows.

gold(y | x) = VADER(y) − 1.0 · repetition(y) − 0.5 · max(0, NLL_base(y | x) − 3.5)

VADER(y) is vaderSentiment's compound score in [−1, 1] (Hutto & Gilbert 2014). VADER alone is stuffed as easily as a
reward model ("great great great"), hence the two penalties: for words said again, and for text that the raw base
model finds unlikely (mean nats a token above a band that fluent answers stay in).
"""

from functools import cache
from typing import TYPE_CHECKING

from align.adapters import RAW_BASE, AdaptedModel
from align.episodes import Episode, collate, policy_pass
from data.batching import prompt_sorted_batches
from data.tokenization import Codec

if TYPE_CHECKING:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

REPETITION_WEIGHT = 1.0
UNLIKELY_WEIGHT = 0.5
NLL_BAND = 3.5  # nats a token; nine tenths of the base's own one-sentence answers lie below


@cache
def _analyzer() -> "SentimentIntensityAnalyzer":
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def repetition(text: str) -> float:
    """The share of words (case and punctuation aside, of four letters or more) that were said before: in [0, 1)."""
    words = [word.strip(".,!?;:\"'()").lower() for word in text.split()]
    words = [word for word in words if len(word) >= 4]
    return 1 - len(set(words)) / len(words) if words else 0.0


def gold_score(text: str, nll: float) -> float:
    """The formula above.

    Args:
        nll: the raw base model's mean NLL of the response, in nats a token.
    """
    compound = float(_analyzer().polarity_scores(text)["compound"])
    return compound - REPETITION_WEIGHT * repetition(text) - UNLIKELY_WEIGHT * max(0.0, nll - NLL_BAND)


def base_nll(
    model: AdaptedModel, codec: Codec, prompts: list[tuple[int, ...]], responses: list[tuple[int, ...]]
) -> list[float]:
    """The raw base model's mean NLL of each response, in nats a token; the end token is left out, since the raw base
    is not asked to be short. A response without another token counts as 0."""
    import torch

    bare = [tuple(i for i in ids if i not in codec.eos_ids) for ids in responses]
    found = [0.0] * len(bare)
    kept = [i for i, ids in enumerate(bare) if ids]
    for group in prompt_sorted_batches([(prompts[i], bare[i]) for i in kept], 16):
        chosen = [kept[j] for j in group]
        batch = collate(
            [Episode(prompts[i], bare[i], has_eos=False) for i in chosen], pad_id=codec.pad_id, device=model.device
        )
        with torch.no_grad(), model.role(RAW_BASE):
            logprobs_BT = policy_pass(model, batch).logprobs_BT
        for i, total in zip(chosen, (-logprobs_BT.sum(-1)).tolist(), strict=True):
            found[i] = total / len(bare[i])
    return found
