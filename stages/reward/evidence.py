"""What people said of responses, in pairs or one by one: what differs between the two is behind one interface."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from align.episodes import Episode
from stages.reward.batches import TrainerRow


@dataclass(frozen=True)
class Labels:
    """What was said of the B rows of a batch."""

    probability_B: Tensor  # float32, that the chosen response is preferred; of a verdict, 1 for good and 0 for bad
    margin_B: Tensor  # float32, 0 where there is none


class Evidence(Protocol):
    """The rows to learn from and the held-out ones, with the objective. `Pairs` and `Verdicts` are the two there are.

    Scores of B rows come as scores_N: of B pairs the chosen ones and then the rejected ones, of B verdicts one each.
    """

    @property
    def centering(self) -> float: ...

    def train_rows(self) -> list[TrainerRow]: ...

    def sides(self, scores_N: Tensor) -> tuple[Tensor, ...]:
        """The scores of each response of a row, (B,) each."""
        ...

    def losses(self, scores_N: Tensor, labels: Labels) -> Tensor:
        """(B,), without centring."""
        ...

    def seen(self, scores_N: Tensor, labels: Labels) -> Mapping[str, float]:
        """What is worth logging of a training step, if its rows allow it."""
        ...

    def held_out_episodes(self) -> list[Episode]:
        """What the scores that the next two take are of."""
        ...

    def held_out_loss(self, scores_N: Tensor) -> float:
        """Without centring."""
        ...

    def report(self, scores_N: Tensor) -> dict[str, object]:
        """The held-out metrics, as JSON."""
        ...
