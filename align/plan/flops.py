"""Floating-point operations, as pure functions: a multiplication and an addition are two.

2 FLOPs a parameter and token in matrix products (Kaplan et al. 2020, table 1), and 4 · S² · heads · head_dim a layer
for the two products of attention over S tokens, causal or not (Chowdhery et al. 2022, PaLM, appendix B). Frozen weights
have no weight gradient: their backward pass is one product as large as the forward one, where LoRA's matrices have
two. The LM head counts at response positions alone. Norms, softmaxes and sampling are left out.
"""

from dataclasses import dataclass

from align.plan.shape import ModelShape


@dataclass(frozen=True)
class Rows:
    sequences: int
    length: int  # tokens of each

    @property
    def tokens(self) -> int:
        return self.sequences * self.length


def forward(shape: ModelShape, rows: Rows, *, rank: int, from_frozen: bool = False) -> int:
    """The decoder layers, one adapter active. `from_frozen`: what the layers below the first adapter say is known."""
    layers = shape.num_learning_layers if from_frozen else shape.num_layers
    products = _frozen(shape, layers, rows.tokens) + _lora(shape, rank, rows.tokens)
    return products + _attention(shape, layers, rows.tokens * rows.length)


def backward(shape: ModelShape, rows: Rows, *, rank: int) -> int:
    """Gradients of the adapter, and of the activations on the way to it."""
    layers = shape.num_learning_layers
    products = _frozen(shape, layers, rows.tokens) + 2 * _lora(shape, rank, rows.tokens)
    return products + 2 * _attention(shape, layers, rows.tokens * rows.length)


def decode(shape: ModelShape, *, rank: int, sequences: int, prompt: int, response: int) -> int:
    """Token after token behind a cached prompt: each attends to all before it. The first response token is drawn from
    the prompt's own pass, so `response` − 1 go in."""
    steps = response - 1
    seen = steps * (prompt + 1) + steps * (steps - 1) // 2
    tokens = sequences * steps
    products = _frozen(shape, shape.num_layers, tokens) + _lora(shape, rank, tokens)
    return products + _attention(shape, shape.num_layers, sequences * seen)


def lm_head(shape: ModelShape, positions: int) -> int:
    return 2 * shape.hidden_size * shape.vocabulary * positions


def _frozen(shape: ModelShape, layers: int, tokens: int) -> int:
    return 2 * shape.num_matmul_parameters * layers // shape.num_layers * tokens


def _lora(shape: ModelShape, rank: int, tokens: int) -> int:
    return 2 * shape.num_lora_parameters(rank) * tokens


def _attention(shape: ModelShape, layers: int, pairs: int) -> int:
    """`pairs` of a token that attends and one that is attended to."""
    return 4 * layers * shape.query_width * pairs
