"""Whatever JSON can hold in a row, a shape raises nothing but UnfitError."""

import random
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.ingestion.shapes import SHAPES, Shape
from tests.data.ingestion.sample_rows import ALL_SHAPES, outcomes, rows_of, sample

KEYS = sorted({key for name in SHAPES for row in sample(name) for key in row} | {"role", "from", "value", "weight"})
TELLING = ["user", "assistant", "prompter", "\n\nHuman: a\n\nAssistant: b", "\ud800", "N/A", 10**400]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(TELLING)
JSON = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*KEYS, "content", "text"]), inner, max_size=4)
    ),
    max_leaves=8,
)


def with_garbage(value: object, garbage: object, draw: random.Random) -> object:
    """`value` with something in it, at any depth, replaced."""
    if draw.random() < 0.2 or not isinstance(value, dict | list) or not value:
        return garbage
    if isinstance(value, list):
        items = cast(list[object], value)
        at = draw.randrange(len(items))
        return [*items[:at], with_garbage(items[at], garbage, draw), *items[at + 1 :]]
    fields = cast(dict[str, object], value)
    key = draw.choice(list(fields))
    return {**fields, key: with_garbage(fields[key], garbage, draw)}


@settings(max_examples=150, deadline=None)
@given(row=st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=3), JSON, max_size=6))
def test_garbage_is_unfit_and_nothing_else(row: dict[str, object]) -> None:
    for shape in ALL_SHAPES:
        shape.matches(row)
        assert outcomes(shape, [row])


@settings(max_examples=100, deadline=None)
@given(garbage=JSON, seed=st.integers(0, 2**32))
def test_garbage_within_a_good_row_is_unfit_and_nothing_else(garbage: object, seed: int) -> None:
    draw = random.Random(seed)
    for shape in ALL_SHAPES:
        fields = dict(draw.choice(rows_of(shape)))
        key = draw.choice(list(fields))
        row = {**fields, key: with_garbage(fields[key], garbage, draw)}
        shape.matches(row)
        assert outcomes(shape, [row])


@pytest.mark.parametrize("shape", ALL_SHAPES)
def test_garbage_nested_deeply_is_unfit_too(shape: Shape) -> None:
    deep: object = "x"
    for _ in range(5_000):
        deep = [deep]
    for key in KEYS:
        outcomes(shape, [dict.fromkeys(KEYS, "x") | {key: deep}, {key: deep}])
