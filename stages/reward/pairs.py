"""Pairs: two responses to a prompt, of which one is preferred, more or less surely or by a margin, or neither is."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from align.config import RewardObjectiveConfig
from align.episodes import Episode
from align.errors import DataError
from data.tokenization import TokenizedComparison
from stages.reward import objective
from stages.reward.batches import TrainerRow
from stages.reward.evidence import Labels
from stages.reward.report import LENGTH_BUCKETS, accuracy, by_bucket, by_source, length_buckets, quarters

_TIE = 0.5
_UNIT = "pairs"


@dataclass(frozen=True)
class Pairs:
    train: tuple[TokenizedComparison, ...]
    held_out: tuple[TokenizedComparison, ...]
    centering: float
    tie_threshold: float | None  # Rao and Kupper's; None: Bradley-Terry

    @staticmethod
    def of(
        train: Sequence[TokenizedComparison], held_out: Sequence[TokenizedComparison], settings: RewardObjectiveConfig
    ) -> "Pairs":
        """DataError if no pair is decided, or one has a margin that the objective has no place for."""
        for side, rows in (("train", train), ("held_out", held_out)):
            if all(row.preference == _TIE for row in rows):
                raise DataError(
                    f"data.reward.{side}: all {len(rows)} pairs are ties (preference 0.5), which say nothing of what "
                    "is better; give pairs of which one response is preferred"
                )
            with_margin = sum(bool(row.margin) for row in rows)
            if with_margin and settings.kind == "rao-kupper":
                raise DataError(
                    f"data.reward.{side}: {with_margin} pairs have a margin, which reward.objective.kind rao-kupper "
                    "has no place for; leave the column out, or set kind to bradley-terry"
                )
        tie_threshold = settings.tie_threshold if settings.kind == "rao-kupper" else None
        return Pairs(tuple(train), tuple(held_out), settings.centering, tie_threshold)

    def train_rows(self) -> list[TrainerRow]:
        return [
            {
                "chosen_ids": [*row.prompt_ids, *row.chosen_ids],
                "rejected_ids": [*row.prompt_ids, *row.rejected_ids],
                "labels": row.preference,
                "margin": row.margin or 0.0,
                "length": len(row.prompt_ids) + len(row.chosen_ids) + len(row.rejected_ids),
            }
            for row in self.train
        ]

    def sides(self, scores_N: Tensor) -> tuple[Tensor, ...]:
        return scores_N.chunk(2)

    def losses(self, scores_N: Tensor, labels: Labels) -> Tensor:
        chosen_B, rejected_B = scores_N.chunk(2)
        preference_B = labels.probability_B
        if self.tie_threshold is not None:
            return objective.rao_kupper_losses(
                chosen_B, rejected_B, preference_B=preference_B, tie_threshold=self.tie_threshold
            )
        return objective.bradley_terry_losses(chosen_B, rejected_B, preference_B=preference_B, margin_B=labels.margin_B)

    def seen(self, scores_N: Tensor, labels: Labels) -> dict[str, float]:
        better_D, worse_D = _decided(scores_N, labels.probability_B)
        if not len(better_D):
            return {}
        right = objective.shares_right(better_D, worse_D).mean().item()
        return {"accuracy": right, "margin": (better_D - worse_D).mean().item()}

    def held_out_episodes(self) -> list[Episode]:
        chosen = [Episode(row.prompt_ids, row.chosen_ids, has_eos=True) for row in self.held_out]
        return [*chosen, *(Episode(row.prompt_ids, row.rejected_ids, has_eos=True) for row in self.held_out)]

    def held_out_loss(self, scores_N: Tensor) -> float:
        return self.losses(scores_N, _labels_of(self.held_out)).mean().item()

    def report(self, scores_N: Tensor) -> dict[str, object]:
        """Accuracy of the decided pairs, whole and in buckets, beside that of a rule that sees only the lengths."""
        better_D, worse_D = _decided(scores_N, _labels_of(self.held_out).probability_B)
        right_D = objective.shares_right(better_D, worse_D)
        better_lengths_D, worse_lengths_D = _decided_lengths(self.held_out)
        apart_D = (better_lengths_D - worse_lengths_D).abs()
        sources = [row.source for row in self.held_out if row.preference != _TIE]
        return {
            **accuracy(right_D),
            **accuracy(self._length_rule_right(), prefix="length_baseline_"),
            "loss": self.held_out_loss(scores_N),
            "margin": (better_D - worse_D).mean().item(),
            "held_out_pairs": len(self.held_out),
            "by_source": by_source(sources, right_D, unit=_UNIT),
            "by_margin": by_bucket(quarters((better_D - worse_D).abs()), right_D, unit=_UNIT),
            "by_length_difference": by_bucket(length_buckets(apart_D), right_D, unit=_UNIT, order=LENGTH_BUCKETS),
        }

    def _length_rule_right(self) -> Tensor:
        """What "the longer (or shorter) is better" gets right of the held-out pairs; which one, the train set says."""
        seen = _decided_lengths(self.train)
        by_longer, by_shorter = (objective.length_rule_right(*seen, longer_wins=wins).sum() for wins in (True, False))
        return objective.length_rule_right(*_decided_lengths(self.held_out), longer_wins=bool(by_longer >= by_shorter))


def _labels_of(rows: Sequence[TokenizedComparison]) -> Labels:
    preference_B = torch.tensor([row.preference for row in rows])
    return Labels(preference_B, torch.tensor([row.margin or 0.0 for row in rows]))


def _decided(scores_N: Tensor, preference_B: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of the better and of the worse response of the pairs that are no ties: (D,) each."""
    chosen_B, rejected_B = scores_N.chunk(2)
    is_chosen_better_B, is_decided_B = preference_B > _TIE, preference_B != _TIE
    better_B = torch.where(is_chosen_better_B, chosen_B, rejected_B)
    worse_B = torch.where(is_chosen_better_B, rejected_B, chosen_B)
    return better_B[is_decided_B], worse_B[is_decided_B]


def _decided_lengths(rows: Sequence[TokenizedComparison]) -> tuple[Tensor, Tensor]:
    """Tokens of the better and of the worse response of the pairs that are no ties: int64 (D,) each."""
    lengths_N = torch.tensor([len(row.chosen_ids) for row in rows] + [len(row.rejected_ids) for row in rows])
    return _decided(lengths_N, _labels_of(rows).probability_B)
