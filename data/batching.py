"""Batches of token sequences: composed by length, padded on the right. The only module of `data` that uses torch."""

from collections.abc import Sequence

import torch
from torch import Tensor


def length_sorted_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices into `lengths`, shortest first (equal lengths in the order given), `batch_size` at a time."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def prompt_sorted_batches(rows: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], batch_size: int) -> list[list[int]]:
    """Indices of rows, each a prompt and a response, `batch_size` at a time: those of one prompt side by side, shortest
    first, for what they share to be computed once (`align.packing`); prompts by their longest row."""
    longest: dict[tuple[int, ...], int] = {}
    for prompt, response in rows:
        longest[prompt] = max(longest.get(prompt, 0), len(prompt) + len(response))
    order = sorted(range(len(rows)), key=lambda i: (longest[rows[i][0]], rows[i][0], len(rows[i][1])))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def right_pad(sequences: Sequence[Sequence[int]], pad_id: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """(ids_BS int64, is_token_BS bool), tokens first; padding holds `pad_id` and False."""
    width = max((len(sequence) for sequence in sequences), default=0)
    rows = [[*sequence, *[pad_id] * (width - len(sequence))] for sequence in sequences]
    is_token = [[True] * len(sequence) + [False] * (width - len(sequence)) for sequence in sequences]
    shape = (len(sequences), width)
    return (
        torch.tensor(rows, dtype=torch.int64, device=device).reshape(shape),
        torch.tensor(is_token, dtype=torch.bool, device=device).reshape(shape),
    )
