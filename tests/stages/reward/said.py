"""Rows with what people said of them, by their lengths alone: for formulas that never look at an id."""

from data.tokenization import TokenizedComparison, TokenizedVerdict


def pair(
    chosen: int = 3, rejected: int = 2, *, preference: float = 1.0, margin: float | None = None, source: str = "a:1"
) -> TokenizedComparison:
    """A pair whose responses have so many tokens."""
    sides = tuple(range(chosen)), tuple(range(rejected))
    return TokenizedComparison((7, 7), *sides, margin=margin, preference=preference, source=source)


def verdict(length: int, is_good: bool, source: str = "a:1") -> TokenizedVerdict:
    return TokenizedVerdict((7, 7), tuple(range(length)), is_good, source)
