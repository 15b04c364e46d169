"""Verdicts: one response to a prompt, and whether a person found it good, such as keeping the norms."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from align.config import RewardObjectiveConfig
from align.episodes import Episode
from align.errors import DataError
from data.tokenization import TokenizedVerdict
from stages.reward import objective
from stages.reward.batches import TrainerRow
from stages.reward.evidence import Labels
from stages.reward.report import accuracy, by_source

_UNIT = "verdicts"


@dataclass(frozen=True)
class Verdicts:
    train: tuple[TokenizedVerdict, ...]
    held_out: tuple[TokenizedVerdict, ...]
    centering: float
    good_weight: float  # of a row's loss
    bad_weight: float

    @staticmethod
    def of(
        train: Sequence[TokenizedVerdict], held_out: Sequence[TokenizedVerdict], settings: RewardObjectiveConfig
    ) -> "Verdicts":
        """DataError if the verdicts of either side are all the same."""
        for side, rows in (("train", train), ("held_out", held_out)):
            good = sum(row.is_good for row in rows)
            if good in (0, len(rows)):
                raise DataError(
                    f"data.reward.{side}: all {len(rows)} labels are {'true' if good else 'false'}; give rows of both "
                    "kinds (if they are split by held_out_fraction, a larger one)"
                )
        num_good = sum(row.is_good for row in train)
        weights = objective.balanced_weights(num_good, len(train) - num_good)
        if settings.positive_weight is not None:
            weights = settings.positive_weight, 1.0
        return Verdicts(tuple(train), tuple(held_out), settings.centering, *weights)

    def train_rows(self) -> list[TrainerRow]:
        return [
            {
                "chosen_ids": [*row.prompt_ids, *row.response_ids],
                "rejected_ids": [],
                "labels": float(row.is_good),
                "margin": 0.0,
                "length": len(row.prompt_ids) + len(row.response_ids),
            }
            for row in self.train
        ]

    def sides(self, scores_N: Tensor) -> tuple[Tensor, ...]:
        return (scores_N,)

    def losses(self, scores_N: Tensor, labels: Labels) -> Tensor:
        return objective.verdict_losses(
            scores_N, is_good_B=labels.probability_B, good_weight=self.good_weight, bad_weight=self.bad_weight
        )

    def seen(self, scores_N: Tensor, labels: Labels) -> dict[str, float]:
        return {"accuracy": _shares_right(scores_N, labels.probability_B).mean().item()}

    def held_out_episodes(self) -> list[Episode]:
        return [Episode(row.prompt_ids, row.response_ids, has_eos=True) for row in self.held_out]

    def held_out_loss(self, scores_N: Tensor) -> float:
        return self.losses(scores_N, self._held_out_labels()).mean().item()

    def report(self, scores_N: Tensor) -> dict[str, object]:
        """How many scores are on the right side of 0, and how well they order good before bad."""
        is_good_B = self._held_out_labels().probability_B
        good_G, bad_B = scores_N[is_good_B > 0], scores_N[is_good_B == 0]
        right_B = _shares_right(scores_N, is_good_B)
        return {
            **accuracy(right_B),
            **accuracy(self._length_rule_right(), prefix="length_baseline_"),
            "auc": objective.area_under_curve(good_G, bad_B).item(),
            "loss": self.held_out_loss(scores_N),
            "margin": (good_G.mean() - bad_B.mean()).item(),
            "held_out_verdicts": len(self.held_out),
            "by_source": by_source([row.source for row in self.held_out], right_B, unit=_UNIT),
        }

    def _held_out_labels(self) -> Labels:
        is_good_B = torch.tensor([float(row.is_good) for row in self.held_out])
        return Labels(is_good_B, torch.zeros_like(is_good_B))

    def _length_rule_right(self) -> Tensor:
        """What the train set's best rule on the response's length alone gets right of the held-out verdicts."""
        threshold, longer_is_good = objective.best_length_rule(
            [len(row.response_ids) for row in self.train], [row.is_good for row in self.train]
        )
        said = [(len(row.response_ids) > threshold) == longer_is_good for row in self.held_out]
        return torch.tensor([float(s == row.is_good) for s, row in zip(said, self.held_out, strict=True)])


def _shares_right(scores_B: Tensor, is_good_B: Tensor) -> Tensor:
    signed_B = torch.where(is_good_B > 0, scores_B, -scores_B)
    return objective.shares_right(signed_B, torch.zeros_like(signed_B))
