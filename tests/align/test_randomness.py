import hashlib

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from align.randomness import key_of, keyed_uniforms, permutation, stage_seed


def test_a_key_is_a_hash_of_its_parts_so_the_same_in_every_process() -> None:
    assert key_of(7, "sample") == int.from_bytes(hashlib.sha256(b"(7, 'sample')").digest()[:16], "little")
    assert key_of(1, 23) != key_of(12, 3)
    assert key_of(1, "2") != key_of(1, 2)


def test_each_stage_has_its_own_seed_from_the_runs() -> None:
    seeds = {stage_seed(run, stage) for run in (0, 1) for stage in ("sft", "reward", "ppo")}
    assert len(seeds) == 6
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert stage_seed(0, "sft") == stage_seed(0, "sft")


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=5, unique=True), st.integers(1, 8), st.integers(0, 8))
def test_an_episodes_uniforms_depend_on_neither_the_others_nor_the_length(
    episodes: list[int], length: int, more: int
) -> None:
    together = keyed_uniforms(0, "sample", 2, episodes, length)
    assert together.shape == (len(episodes), length)
    assert together.dtype == np.float64
    assert ((together >= 0) & (together < 1)).all()
    for row, episode in zip(together, episodes, strict=True):
        assert (keyed_uniforms(0, "sample", 2, [episode], length + more)[0, :length] == row).all()


def test_every_part_of_the_key_counts() -> None:
    keys = [(0, "sample", 0, 0), (1, "sample", 0, 0), (0, "other", 0, 0), (0, "sample", 1, 0), (0, "sample", 0, 1)]
    rows = [tuple(keyed_uniforms(seed, what, update, [episode], 4)[0]) for seed, what, update, episode in keys]
    assert len(set(rows)) == 5
    assert len({value for row in rows for value in row}) == 20


def test_no_episodes_are_no_rows() -> None:
    assert keyed_uniforms(0, "sample", 0, [], 4).shape == (0, 4)


def test_a_permutation_holds_every_index_once_and_is_another_for_another_key() -> None:
    found = [permutation(0, "minibatches", update, epoch, size=20) for update in range(3) for epoch in range(3)]
    assert all(sorted(order) == list(range(20)) for order in found)
    assert len({tuple(order) for order in found}) == 9
    assert permutation(0, "minibatches", 1, 2, size=20) == found[5]
