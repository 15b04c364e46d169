"""What a data set is to be: the settings of an ingestion, and the reasons for which it rejects a row."""

from collections.abc import Callable
from dataclasses import dataclass

from data.ingestion.shapes import Shape
from data.records import RecordKind
from data.tokenization import Codec

# In the order in which they are looked for. The reasons that single rows are rejected for come from data.formats and,
# for token lengths, from data.tokenization.
IDENTICAL = "identical after normalisation"
TIE = "tie"
DUPLICATE = "exact duplicate"
CONTRADICTORY = "contradictory"
LEAKAGE = "prompt is held out"
NEAR_DUPLICATE = "near duplicate"
NEAR_LEAKAGE = "prompt is nearly held out"
NOT_DRAWN = "not drawn by weight"
ACROSS_ROWS = (DUPLICATE, CONTRADICTORY, LEAKAGE, NEAR_DUPLICATE, NEAR_LEAKAGE, NOT_DRAWN)


@dataclass(frozen=True)
class TokenRule:
    """Rows are held against the length that the stages will train at, with the tokenization that they share."""

    max_length: int  # tokens, as <stage>.max_length; of a prompt ppo.rollout.max_prompt_length
    tokenizer: str  # as base.model
    system_prompt: str | None
    load_codec: Callable[[str, str | None], Codec]  # a module's own function: equal, and hashed alike, in every process


@dataclass(frozen=True)
class RowRules:
    """What one row is held against, by itself."""

    kind: RecordKind
    seed: int
    keep_ties: bool = False
    tokens: TokenRule | None = None
    has_signatures: bool = False  # near duplicates will be looked for


@dataclass(frozen=True)
class SetRules:
    """What rows are held against together."""

    held_out_fraction: float
    near_threshold: float | None = None  # Jaccard similarity of word shingles
    weights: tuple[float, ...] = ()  # a source's share of the kept rows; empty: all of each


@dataclass(frozen=True)
class SourceFile:
    """One file that goes in, with the shape that its rows are read as."""

    name: str  # as the user gave it, or as the glob found it
    source: int  # of which SOURCE
    shape: Shape
    is_held_out: bool = False
    is_detected: bool = False  # the shape, from most of the first rows: others may have another
