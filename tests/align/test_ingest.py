"""The words of `align ingest` that mean more than one thing."""

import pytest

from align.errors import UsageError
from align.ingest import as_columns, as_held_out


def test_a_lone_number_is_a_fraction_and_everything_else_a_source() -> None:
    assert as_held_out(()) == (0.05, ())
    assert as_held_out(("0.2",)) == (0.2, ())
    assert as_held_out(("a.jsonl", "b.jsonl")) == (0.05, ("a.jsonl", "b.jsonl"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("1.0",), "--held-out 1.0: a fraction is from 0 to below 1"),
        (("0.1", "0.2"), "--held-out 0.1 --held-out 0.2: give one fraction, or sources, not 0.1 too"),
        (("a.jsonl", "0.2"), "not 0.2 too"),
    ],
)
def test_a_number_among_others_is_refused(given: tuple[str, ...], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        as_held_out(given)


def test_columns_are_pairs_of_ours_and_theirs() -> None:
    assert as_columns(None) == ()
    assert as_columns("prompt=a+b, chosen = c") == (("prompt", "a+b"), ("chosen", "c"))
    for wrong, said in (("prompt", "wanted is ours=theirs"), ("prompt=a,prompt=b", "prompt stands twice")):
        with pytest.raises(UsageError, match=said):
            as_columns(wrong)
