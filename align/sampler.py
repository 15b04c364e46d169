"""Episodes from prompts. The uniforms that a response is drawn with follow from seed, purpose, turn and its number."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from align.adapters import AdaptedModel
from align.context import Sampling
from align.episodes import Episode
from align.generation import generate
from align.randomness import keyed_uniforms
from data.records import Message
from data.tokenization import Codec, TokenizedPrompt


@dataclass(frozen=True)
class Sampler:
    """`seed` is the stage's own."""

    model: AdaptedModel
    codec: Codec
    sampling: Sampling
    seed: int

    def episodes(
        self,
        prompts: Sequence[TokenizedPrompt],
        *,
        role: str,
        purpose: str,
        turn: int = 0,
        each: int = 1,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[Episode]:
        """`each` responses of `role` to each prompt, one prompt's side by side.

        Args:
            purpose: other purposes draw other uniforms, and so do other turns (updates).
            on_progress: as `generate` has it.
        """
        asked = [(group, prompt) for group, prompt in enumerate(prompts) for _ in range(each)]
        numbers = list(range(turn * len(asked), (turn + 1) * len(asked)))
        uniforms_BT = keyed_uniforms(self.seed, purpose, turn, numbers, self.sampling.max_response_length)
        with self.model.role(role):
            responses = generate(
                self.model,
                self.codec,
                [prompt.ids for _, prompt in asked],
                sampling=self.sampling,
                uniforms_BT=uniforms_BT,
                on_progress=on_progress,
            )
        return [
            Episode(prompt.ids, r.ids, r.has_eos, r.logprobs, text_of(prompt.messages), group)
            for (group, prompt), r in zip(asked, responses, strict=True)
        ]


def text_of(prompt: Sequence[Message]) -> str:
    """A prompt as a scorer reads it: the user's words, or of several turns each with its role before it."""
    turns = [message for message in prompt if message.role != "system"]
    if len(turns) == 1:
        return turns[0].content
    return "\n".join(f"{turn.role}: {turn.content}" for turn in turns)
