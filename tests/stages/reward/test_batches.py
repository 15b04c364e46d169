from typing import Any

import pytest
import torch
from torch import Tensor, nn

from align.adapters import AdaptedModel
from align.config import RewardObjectiveConfig
from align.heads import ScalarHead
from stages.reward import batches
from stages.reward.batches import Collator, TrainerRow, batch_scores, can_share
from stages.reward.pairs import Pairs
from tests.resident import SHAPES, resident, with_adapters
from tests.stages.reward.said import pair


def rows_of(*lengths: tuple[int, int, int]) -> list[TrainerRow]:
    """Of so many tokens of prompt, chosen and rejected each, all different in a row."""
    rows: list[TrainerRow] = []
    for prompt, chosen, rejected in lengths:
        ids = list(range(1, prompt + chosen + rejected + 1))
        rows.append(
            {
                "chosen_ids": ids[: prompt + chosen],
                "rejected_ids": ids[:prompt] + ids[prompt + chosen :],
                "prompt_length": prompt,
                "labels": 1.0,
                "margin": 0.0,
                "length": len(ids),
            }
        )
    return rows


def test_two_responses_stand_behind_one_prompt_and_do_not_see_each_other() -> None:
    batch = Collator(9, torch.float32, is_sharing=True)(rows_of((2, 1, 2), (1, 2, 1)))
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5], [1, 2, 3, 4, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 2, 3], [0, 1, 2, 1, 0]]
    sees = batch["attention_mask"] == 0
    assert sees[:, 0].int().tolist() == [
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], [1, 1, 0, 1, 1]],
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 1, 0], [1, 0, 0, 1, 1]],
    ]
    assert batch["rows"].tolist() == [0, 1, 0, 1]
    assert batch["last"].tolist() == [2, 2, 4, 3]
    assert batch["num_tokens"] == 3 + 3 + 4 + 2  # as they are in sequences of their own


def test_the_pairs_of_the_stage_say_where_their_prompt_ends() -> None:
    (row,) = Pairs.of([pair(3, 1)], [pair()], RewardObjectiveConfig()).train_rows()
    ids = Collator(9, torch.float32, is_sharing=True)([row])["input_ids"]
    assert ids.tolist() == [[7, 7, 0, 1, 2, 0]]


def test_long_rows_stand_alone() -> None:
    collate = Collator(0, torch.float32, is_sharing=True)
    assert len(collate(rows_of((112, 200, 200), (5, 1, 1)))["input_ids"]) == 2
    assert len(collate(rows_of((113, 200, 200), (5, 1, 1)))["input_ids"]) == 4


@pytest.mark.parametrize("shape", SHAPES)
def test_the_scores_are_those_of_separate_sequences(shape: str) -> None:
    model = with_adapters(shape, "reward")
    head = ScalarHead(model.hidden_size).initialize(0)
    rows = rows_of((5, 3, 9), (9, 12, 1), (1, 1, 2))
    shared, separate = (Collator(0, torch.float32, is_sharing)(rows) for is_sharing in (True, False))
    with torch.no_grad(), model.role("reward"):
        one, other = (batch_scores(model, head, batch) for batch in (shared, separate))
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


# ---- which bases may share ----


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bases_of_plain_attention_may_share(shape: str, dtype: str) -> None:
    assert can_share(resident(shape, dtype=dtype))


def test_a_base_whose_layers_pass_on_by_other_ways_may_not(monkeypatch: pytest.MonkeyPatch) -> None:
    model = resident("llama")
    trunk = model.trunk

    class Recurrent(nn.Module):
        def forward(self, **inputs: Any) -> Any:
            out = trunk(**inputs)
            out.last_hidden_state = out.last_hidden_state.cumsum(1)
            return out

    monkeypatch.setattr(AdaptedModel, "trunk", Recurrent())
    assert not can_share(model)


def test_a_base_that_takes_no_such_mask_may_not(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(nn.Module):
        def forward(self, attention_mask: Tensor, **inputs: Any) -> Any:
            raise ValueError(f"a mask of {attention_mask.ndim} dimensions")

    model = resident("llama")
    monkeypatch.setattr(AdaptedModel, "trunk", Refusing())
    assert not can_share(model)


def test_a_base_with_a_short_window_may_not(monkeypatch: pytest.MonkeyPatch) -> None:
    model = resident("llama")
    for window, may in ((batches._SHARED_LENGTH, True), (batches._SHARED_LENGTH - 1, False)):  # pyright: ignore[reportPrivateUsage]
        monkeypatch.setattr(model.base.model.config, "sliding_window", window, raising=False)
        assert can_share(model) == may
