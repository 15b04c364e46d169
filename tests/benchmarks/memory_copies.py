"""The roles of PPO on copies of the base, as a trainer has them that loads a model for each: memory's other layouts."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn
from transformers import Cache

from align.adapters import AdaptedModel
from align.logprobs import LMHead


class SeparateCopies(AdaptedModel):
    """What `run_ppo` takes for one resident model, but each adapter lives on the copy that `homes` names: the first
    unless it names another. So the same code runs in every layout."""

    def __init__(self, copies: Sequence[AdaptedModel], homes: Mapping[str, int]) -> None:
        self.base = copies[0].base
        self._copies = copies
        self._homes = homes
        self._present = copies[0]

    def _home(self, name: str) -> AdaptedModel:
        return self._copies[self._homes.get(name, 0)]

    @property
    def trunk(self) -> nn.Module:
        return self._present.trunk

    @property
    def lm_head(self) -> LMHead:
        return self._present.lm_head

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(name for copy in self._copies for name in copy.names))

    def add(self, name: str, *, seed: int = 0, copy_of: str | None = None) -> None:
        home = self._home(name)
        if copy_of is None or copy_of in home.names:
            home.add(name, seed=seed, copy_of=copy_of)
            return
        home.add(name, seed=seed)
        source = self.tensors(copy_of)
        for key, tensor in home.tensors(name).items():
            tensor.data.copy_(source[key].data)

    def load(self, name: str, folder: Path) -> None:
        self._home(name).load(name, folder)

    def save(self, name: str, folder: Path) -> None:
        self._home(name).save(name, folder)

    @contextmanager
    def role(self, name: str, *, train: bool = False) -> Generator[None]:
        before, self._present = self._present, self._home(name)
        try:
            with self._present.role(name, train=train):
                yield
        finally:
            self._present = before

    def tensors(self, name: str) -> dict[str, nn.Parameter]:
        return self._home(name).tensors(name)

    def hidden(self, ids_BS: Tensor, is_token_BS: Tensor | None = None, *, is_checkpointed: bool = False) -> Tensor:
        return self._present.hidden(ids_BS, is_token_BS, is_checkpointed=is_checkpointed)

    def plain_hidden(self, ids_BS: Tensor, is_token_BS: Tensor, *, cache: Cache | None = None) -> Tensor:
        return self._present.plain_hidden(ids_BS, is_token_BS, cache=cache)
