"""Randomness without a shared stream: every draw is a function of (run seed, stage, update, episode, position).

So no result depends on batch composition, refilled slots, worker count or order.
"""

import hashlib

import numpy as np


def stage_seed(run_seed: int, stage: str) -> int:
    """The seed of one stage, in [0, 2**31)."""
    return key_of(run_seed, stage) % 2**31


def key_of(*parts: int | str) -> int:
    """A 128-bit key of the parts, the same in every process."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:16], "little")


def keyed_uniforms(seed: int, purpose: str, update: int, episodes: list[int], length: int) -> np.ndarray:
    """One uniform in [0, 1) a token: float64 of shape (len(episodes), length).

    Row i is the Philox stream keyed by (seed, purpose, update, episodes[i]); its position t is the token's.
    """
    rows = [
        np.random.Generator(np.random.Philox(key=key_of(seed, purpose, update, episode))).random(length)
        for episode in episodes
    ]
    return np.stack(rows) if rows else np.empty((0, length))


def permutation(seed: int, purpose: str, *parts: int, size: int) -> list[int]:
    """A keyed shuffle of range(size)."""
    generator = np.random.Generator(np.random.Philox(key=key_of(seed, purpose, *parts)))
    return [int(i) for i in generator.permutation(size)]


def drawn_indices(seed: int, purpose: str, turn: int, *, num_drawn: int, size: int) -> list[int]:
    """Which of `size` rows the turn draws (prompts: an update's): epoch after epoch through keyed shuffles of all."""
    indices = []
    shuffles: dict[int, list[int]] = {}
    for number in range(turn * num_drawn, (turn + 1) * num_drawn):
        epoch, place = divmod(number, size)
        if epoch not in shuffles:
            shuffles[epoch] = permutation(seed, purpose, epoch, size=size)
        indices.append(shuffles[epoch][place])
    return indices
