"""A static key/value cache whose slots are refilled: the memory of `align.generation`.

All slots write the same column at the same time. A prompt enters so that it ends just before that column, in whatever
slot is free, so a slot holds its row's tokens without a gap from the row's first column to the present one. Masks and
sliding windows then mean what they mean under left padding, and one step writes one slice. At the last column the
window moves back to the left.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from align.adapters import AdaptedModel
from align.errors import ModelError
from align.packing import present
from data.batching import right_pad


class Slots:
    """Owns the cache: which columns hold whose keys and values. Slots 0 … len − 1 are in use.

    Args:
        size: slots.
        max_prompt: tokens of the longest prompt that will enter.
        max_response: tokens; a row leaves with its last one.
        is_refilled: whether rows enter while others go on.
    """

    def __init__(
        self, model: AdaptedModel, *, size: int, max_prompt: int, max_response: int, is_refilled: bool
    ) -> None:
        self._model = model
        self._size = size
        self._max_prompt = max_prompt
        # Refilled, the window moves back once every `max_response` steps; otherwise it never has to.
        self._num_columns = max_prompt + max_response * (2 if is_refilled else 1)
        self._column = max_prompt  # that the next token is written to
        self._starts: list[int] = []  # of each slot in use: its row's first column
        self._entering: _Entering | None = None
        self._tensors: list[Tensor] = []  # keys and values of every layer: (slots, groups, columns, D)
        self._cache = Cache(layer_class_to_replicate=lambda: _Layer(self))  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self._starts)

    def enter(self, prompts: Sequence[tuple[int, ...]], *, pad_id: int) -> Tensor:
        """Put prompts into free slots, after those in use; equal ones are computed once.

        Returns:
            The last hidden states (len(prompts), H).
        """
        places = {ids: place for place, ids in enumerate(dict.fromkeys(prompts))}
        device = self._model.device
        ids_PS, is_token_PS = right_pad(list(places), pad_id, device)
        rows_B1 = torch.tensor([[places[ids]] for ids in prompts], device=device)
        lengths_B1 = torch.tensor([[len(ids)] for ids in prompts], device=device)
        ends_alike_BS = torch.arange(ids_PS.shape[1], device=device) - (ids_PS.shape[1] - lengths_B1)
        self._entering = _Entering(rows_B1, ends_alike_BS.clamp(min=0))
        hidden_PSH = self._model.plain_hidden(ids_PS, is_token_PS, cache=self._cache)
        self._entering = None
        hidden_BH = hidden_PSH[rows_B1, lengths_B1 - 1][:, 0]
        self._starts += [self._column - len(ids) for ids in prompts]
        return hidden_BH

    def advance(self, tokens: Sequence[int]) -> Tensor:
        """Take in one more token of every row; returns the last hidden states (len, H)."""
        if self._column == self._num_columns:
            self._move_back()
        device = self._model.device
        starts_B1 = torch.tensor(self._starts, device=device)[:, None]
        columns_L = torch.arange(self._first, self._column + 1, device=device)
        inputs = {
            "input_ids": torch.tensor(tokens, device=device)[:, None],
            "attention_mask": columns_L >= starts_B1,
            "position_ids": self._column - starts_B1,
        }
        if self._model.base.is_compiled and len(self) > 1:  # a single row has another graph
            hidden_B1H = self._model.step(self._cache, self._windows(), **inputs)
        else:
            hidden_B1H = self._model.trunk(past_key_values=self._cache, use_cache=True, **inputs).last_hidden_state
        self._column += 1
        return hidden_B1H[:, -1]

    def leave(self, is_done: Sequence[bool]) -> list[int]:
        """Free the slots of rows that are done; the last rows move into the gaps.

        Returns:
            Of each slot still in use the slot that its row was in.
        """
        kept = [slot for slot, done in enumerate(is_done) if not done]
        gaps = [slot for slot in range(len(kept)) if is_done[slot]]
        movers = kept[len(kept) - len(gaps) :]
        order = list(range(len(kept)))
        for gap, mover in zip(gaps, movers, strict=True):
            order[gap] = mover
        if gaps:
            columns = slice(min(self._starts[slot] for slot in movers), self._column)
            for tensor in self._tensors:
                tensor[gaps, :, columns] = tensor[movers, :, columns]
        self._starts = [self._starts[slot] for slot in order]
        return order

    @property
    def _first(self) -> int:
        return min(self._starts)

    def _window(self, cached: Tensor) -> Tensor:
        """What the queries of a step see; its last column is the one to be written."""
        return cached[: len(self), :, self._first : self._column + 1]

    def _windows(self) -> "list[_Window]":
        keys_and_values = [self._window(tensor) for tensor in self._tensors]
        return [_Window(*pair) for pair in zip(keys_and_values[::2], keys_and_values[1::2], strict=True)]

    def _move_back(self) -> None:
        """To where the oldest row begins in column 0, but leave room for the longest prompt to enter."""
        by = min(self._first, self._column - self._max_prompt)
        for tensor in self._tensors:
            tensor[:, :, : self._column - by] = tensor[:, :, by : self._column].clone()
        self._column -= by
        self._starts = [start - by for start in self._starts]

    # ---- what the layers ask ----

    def allocate(self, like: Tensor) -> Tensor:
        # Zeros: what no row has written yet is masked, but 0 · NaN would come through
        # A column before the first: a compiled step would have one more graph for windows that begin at address 0
        size = (self._size, like.shape[1], 1 + self._num_columns, like.shape[3])
        self._tensors.append(like.new_zeros(size)[:, :, 1:])
        return self._tensors[-1]

    def store(self, cached: Tensor, new: Tensor) -> Tensor:
        """Write keys or values (B, groups, S, D); returns those that the queries see."""
        if self._entering is not None:
            packing = present()
            rows = new if packing is None else packing.unpack(new, dim=2)
            used, entering = len(self), self._entering
            place = slice(self._column - rows.shape[2], self._column)
            moved = rows.transpose(1, 2)[entering.rows_B1, entering.tokens_BS].transpose(1, 2)
            cached[used : used + len(moved), :, place] = moved
            return new
        window = self._window(cached)
        window[:, :, -1:] = new
        return window

    def seen(self) -> int:
        """Columns before the present tokens that their queries see."""
        return 0 if self._entering is not None else self._column - self._first


@torch.no_grad()
def verify_decoding(model: AdaptedModel) -> None:
    """That a token behind a cached prompt means what it means in a whole row. ModelError if not: an architecture that
    keeps more than keys and values would otherwise fail, or lie, when the first answers are drawn."""
    name, vocabulary = type(model.base.model).__name__, int(model.base.model.config.get_text_config().vocab_size)
    ids = tuple(number * vocabulary // 9 for number in range(1, 9))  # the first ones are special, and ill-conditioned
    slots = Slots(model, size=1, max_prompt=len(ids), max_response=1, is_refilled=False)
    try:
        slots.enter([ids[:-1]], pad_id=0)
        ours_H = slots.advance(ids[-1:])[0].float()
    except Exception as error:  # noqa: BLE001 # whatever a layer makes of a cache that is not its own
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ModelError(
            f"base.model: {name} cannot decode over keys and values alone ({type(error).__name__}: {reason}); choose a "
            "base whose layers all attend"
        ) from None
    whole_H = model.trunk(input_ids=torch.tensor([ids], device=model.device), use_cache=False).last_hidden_state[0, -1]
    difference = ((ours_H - whole_H.float()).norm() / whole_H.float().norm()).item()
    # Rounding in bfloat16 makes some 0.01 of it; without what is cached it would be about 1
    if not difference <= (1e-3 if model.base.dtype == torch.float32 else 0.5):
        raise ModelError(
            f"base.model: {name} says something else of a token behind cached keys and values than in a whole row "
            f"(by {difference:.3g} of it); this architecture is not supported"
        )


@dataclass(frozen=True)
class _Entering:
    """How prompts that are computed side by side, each once and padded on the right, come to end in one column."""

    rows_B1: Tensor  # which of them each new slot takes
    tokens_BS: Tensor  # which token of it each column takes; any before its first column


@dataclass(frozen=True)
class _Window:
    """What one layer sees at one step: keys and values (B, groups, L, D), the last column still to be written."""

    keys: Tensor
    values: Tensor

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys[:, :, -1:] = key
        self.values[:, :, -1:] = value
        return self.keys, self.values


class _Layer(CacheLayerMixin):
    """One decoder layer's keys and values, in transformers' terms."""

    is_sliding = False  # sliding layers hold whole rows too: their window is in the mask

    def __init__(self, slots: Slots) -> None:
        super().__init__()
        self._slots = slots

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = self._slots.allocate(key_states), self._slots.allocate(value_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        return self._slots.store(self.keys, key_states), self._slots.store(self.values, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._slots.seen() + query_length, 0

    def get_seq_length(self) -> int:
        return self._slots.seen()

    def get_max_length(self) -> int:
        return -1
