"""What roofline calls useful work, counted from the model's shape; P and R are a layer's weights and LoRA weights.

    a token forward through one layer      2 (P + R)
    causal attention forward, one layer    4 · heads · head_dim for each pair of a query and a key that it may see
    a token through the LM head            2 · width · vocabulary, response tokens alone
    backward                               2 P + 4 R a token, attention twice its forward, the LM head once more

Frozen weights get no gradient, so their backward is one product, not two. A LoRA matrix needs both. Of causal
attention, the backward's exact products are dV, dP, dQ and dK; nothing that is computed again counts (the scores of
flash attention). The embeddings are frozen as well: nothing asks for the gradient by the input of the first layer's q,
k and v. Norms, rotations, softmax and scalar heads are counted as nothing, and the last layer as if its whole output
were used, as is the custom.
"""

from dataclasses import dataclass

from tests.benchmarks.ppo_update_task import Shape


@dataclass(frozen=True)
class Rows:
    """Rows of one length; as a decoding step: of one token each, after `past` others."""

    count: int
    length: int
    past: int = 0

    @property
    def tokens(self) -> int:
        return self.count * self.length

    @property
    def pairs(self) -> int:
        """Of a query and a key that it may see, itself among them."""
        return self.count * (self.length * self.past + self.length * (self.length + 1) // 2)


@dataclass(frozen=True)
class Counted:
    """The linear layers of all decoder layers together, and the LM head."""

    weights: int
    lora: int
    head: int
    first_inputs: int  # weights of the first layer's q, k and v
    first_inputs_lora: int  # of their A, which reads the input
    attention: int  # heads · head_dim · layers
    cached: int  # numbers that the key/value cache holds of one token

    @staticmethod
    def of(shape: Shape, rank: int) -> "Counted":
        head_dim = shape.width // shape.heads
        queries, groups = shape.heads * head_dim, shape.kv_heads * head_dim
        reading = [(shape.width, queries), (shape.width, groups), (shape.width, groups)]
        others = [(queries, shape.width), *2 * [(shape.width, shape.intermediate)], (shape.intermediate, shape.width)]
        return Counted(
            weights=shape.layers * sum(i * o for i, o in reading + others),
            lora=shape.layers * rank * sum(i + o for i, o in reading + others),
            head=shape.width * shape.vocabulary,
            first_inputs=sum(i * o for i, o in reading),
            first_inputs_lora=rank * sum(i for i, _ in reading),
            attention=shape.layers * queries,
            cached=2 * shape.layers * groups,
        )

    def forward(self, rows: Rows, *, headed: int) -> int:
        """FLOPs with an adapter on; `headed`: tokens that go on through the LM head."""
        return 2 * (self.weights + self.lora) * rows.tokens + 4 * self.attention * rows.pairs + 2 * self.head * headed

    def backward(self, rows: Rows, *, headed: int) -> int:
        layers = 2 * self.weights + 4 * self.lora - 2 * (self.first_inputs + self.first_inputs_lora)
        return layers * rows.tokens + 8 * self.attention * rows.pairs + 2 * self.head * headed

    def step_bytes(self, rows: Rows, *, itemsize: int) -> int:
        """What a decoding step must read: every weight once, the adapter's in float32, and each row's cache."""
        return (self.weights + self.head) * itemsize + 4 * self.lora + self.cached * rows.past * rows.count * itemsize


def decode_steps(count: int, prompt: int, response: int) -> list[Rows]:
    """A prompt's prefill draws the first token; each step takes in the one before and draws the next."""
    return [Rows(count, 1, prompt + done) for done in range(response - 1)]
