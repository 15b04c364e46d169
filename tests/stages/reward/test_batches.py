import pytest
import torch

from align.config import RewardObjectiveConfig
from align.heads import ScalarHead
from stages.reward.batches import Collator, batch_scores
from stages.reward.pairs import Pairs
from tests.resident import SHAPES, with_adapters
from tests.stages.reward.said import pair


@pytest.mark.parametrize("shape", SHAPES)
def test_the_score_is_read_at_the_last_token_of_each_response(shape: str) -> None:
    model = with_adapters(shape, "reward")
    head = ScalarHead(model.hidden_size).initialize(0)
    rows = Pairs.of([pair(3, 1), pair(1, 2)], [pair()], RewardObjectiveConfig()).train_rows()
    sides = [*(row["chosen_ids"] for row in rows), *(row["rejected_ids"] for row in rows)]
    with torch.no_grad(), model.role("reward"):
        scores = batch_scores(model, head, Collator(9)(rows))
        alone = [head(model.hidden(torch.tensor([ids])))[0, -1, 0] for ids in sides]
    torch.testing.assert_close(scores, torch.stack(alone), atol=1e-5, rtol=1e-4)
