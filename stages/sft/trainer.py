"""TRL's SFTTrainer with the LM head of align.logprobs: learnt tokens only, and their gradient in the same walk."""

from typing import Any

from torch import Tensor, nn
from trl.trainer.sft_trainer import SFTTrainer

from align.adapters import AdaptedModel
from align.episodes import learnt_logprobs
from align.errors import InvariantError


class NLLTrainer(SFTTrainer):
    """SFTTrainer on the resident model. Its loss is TRL's own, the sum of NLL over the learnt tokens of the step.

    Departure: without a GPU, TRL sends every token through the LM head, the prompt's and padding's too, twice. Its
    token accuracy and entropy, which are of the same logits, are not logged.
    """

    def __init__(self, *args: Any, resident: AdaptedModel, **kwargs: Any) -> None:
        super().__init__(*args, model=resident.peft, **kwargs)
        self._resident = resident
        self._num_tokens = 0

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        if return_outputs or num_items_in_batch is None:
            raise InvariantError("the trainer evaluates, or did not count the tokens that its loss is divided by")
        ids_BS, mask_BS = inputs["input_ids"], inputs["attention_mask"]
        hidden_BSH = self._resident.plain_hidden(ids_BS, mask_BS.bool())
        logprobs_N = learnt_logprobs(self._resident, hidden_BSH, ids_BS, inputs["labels"] != -100)
        self._num_tokens += int(mask_BS.sum())
        return -logprobs_N.sum() / num_items_in_batch

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log({**logs, "num_tokens": self._num_tokens}, start_time)
