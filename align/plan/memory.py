"""Bytes, as pure functions of shape and sizes.

What is state (weights, adapters, moments, gradients, cache) is counted exactly. What autograd and the kernels hold is
counted term by term, as read off the code and off torch.autograd.graph.saved_tensors_hooks;
`python -m tests.benchmarks forecast` holds the sum against real peaks.
"""

from dataclasses import dataclass, fields

from align.plan.shape import ModelShape

FLOAT32 = 4
MOMENTS = 2  # AdamW's, float32 each (Kingma & Ba 2015; Loshchilov & Hutter 2019)

# ---- Calibration: what to look at again when the kernels change ----
NORMS = 2  # a decoder layer's, each of which keeps its input in float32 (with a kernel in its dtype), and its scale
KEPT_GATED = 3  # tensors as wide as the MLP: gate, act(gate) and up
KEPT_POINTWISE = 2  # with a kernel: gate and up
KEPT_PLAIN = 4  # what GPT-2's act keeps of its steps; an act that is one kernel keeps 1
LOGPROB_ROWS, LOGPROB_TILE = 1024, 2048  # of align.logprobs: tokens and vocabulary entries walked at a time
LOGPROB_TILE_COPIES = 3  # float32: the tile's logits, their exponentials, and one between
LOGPROB_SUMS = 3  # float32 vectors of the hidden size that a token learnt from keeps or adds up
ENTERING_TOKENS = 8192  # of align.generation: prompts' tokens computed at a time
SAMPLER_BYTES = 8  # an entry of the vocabulary, beside its logit: probability and scaled logit
PROCESS_BYTES = 60 * 10**6  # on a CPU, above the imports: tokenizer, kernels' code and scratch
HEAP_HOLES = 0.4  # on a CPU, of the activations: glibc's heap grows by the holes between tensors of so many sizes


@dataclass(frozen=True)
class Footprint:
    """Bytes by kind, of one device at one moment."""

    weights: int = 0  # of the base
    adapters: int = 0  # with the scalar heads
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    cache: int = 0  # keys and values
    logits: int = 0
    host: int = 0  # beside tensors; 0 on a GPU

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def kept_for_backward(shape: ModelShape, *, rank: int, dtype_bytes: int, dropout: bool = False) -> dict[str, int]:
    """Bytes that autograd keeps of one token in the layers that learn, by what they are.

    Frozen weights keep no input. Each norm keeps its own; each adapted linear its input (q, k and v one together, as do
    gate and up) and x Aᵀ; attention q, k, v and a log-sum a head, its output being the output projection's input; the
    MLP what lies between its products, or with a kernel what goes into it (align.kernels.pointwise). Kernels of
    FlashAttention's kind are taken for granted: no S × S scores. With dropout the layers are PEFT's own: noise and what
    it left stand in float32 for each of them.
    """
    inputs = sum(linear.in_features for linear in shape.adapted if not linear.shares_input)
    all_inputs = sum(linear.in_features for linear in shape.adapted)
    heads = (shape.query_width + 2 * shape.kv_width) * dtype_bytes + shape.num_heads * FLOAT32
    mlp = KEPT_POINTWISE if shape.has_kernels else KEPT_GATED if shape.is_gated else KEPT_PLAIN
    norm = shape.hidden_size * (dtype_bytes if shape.has_kernels else FLOAT32) + FLOAT32
    return {
        "norms": shape.num_learning_layers * NORMS * norm,
        "adapted inputs": 2 * all_inputs * FLOAT32 if dropout else inputs * dtype_bytes,
        "low ranks": len(shape.adapted) * rank * (FLOAT32 if dropout else dtype_bytes),
        "attention": shape.num_learning_layers * heads,
        "mlp": shape.num_learning_layers * mlp * shape.mlp_width * dtype_bytes,
    }


def layer_workspace(shape: ModelShape, *, dtype_bytes: int) -> int:
    """Bytes of one token that a layer's kernels hold at once, kept or not: the inner tensors of the MLP, or as many of
    their gradients, and two of the residual stream."""
    return (3 if shape.is_gated else 2) * shape.mlp_width * dtype_bytes + 2 * shape.hidden_size * FLOAT32


def training_activations(
    shape: ModelShape, tokens: int, *, rank: int, dtype_bytes: int, dropout: bool = False, is_checkpointed: bool = False
) -> int:
    """Bytes at the start of a micro-batch's backward pass. Checkpointed (Chen et al. 2016), each layer keeps its input
    alone, and one layer at a time is computed again."""
    kept = sum(kept_for_backward(shape, rank=rank, dtype_bytes=dtype_bytes, dropout=dropout).values())
    if is_checkpointed:
        kept = kept // shape.num_learning_layers + shape.num_learning_layers * shape.hidden_size * dtype_bytes
    return tokens * (kept + layer_workspace(shape, dtype_bytes=dtype_bytes))


def forward_activations(shape: ModelShape, tokens: int, *, dtype_bytes: int) -> int:
    """Bytes of a pass without gradients: one layer's at a time, and the last hidden states."""
    return tokens * (layer_workspace(shape, dtype_bytes=dtype_bytes) + shape.hidden_size * dtype_bytes)


def said_below(shape: ModelShape, tokens: int, *, dtype_bytes: int) -> int:
    """What the layers below all adapters said of a whole rollout, which PPO keeps."""
    return tokens * shape.hidden_size * dtype_bytes if shape.num_frozen_layers else 0


def cache_bytes(shape: ModelShape, *, slots: int, columns: int, dtype_bytes: int) -> int:
    """Keys and values of every layer."""
    return 2 * shape.num_layers * slots * columns * shape.kv_width * dtype_bytes


def sampler_logits(shape: ModelShape, slots: int, *, dtype_bytes: int) -> int:
    return slots * shape.vocabulary * (dtype_bytes + SAMPLER_BYTES)


def logprob_logits(shape: ModelShape, tokens: int) -> int:
    """Behind the logprobs of `tokens` tokens: a tile of logits, and what a gradient by the hidden states needs."""
    tile = min(tokens, LOGPROB_ROWS) * min(shape.vocabulary, LOGPROB_TILE) * FLOAT32 * LOGPROB_TILE_COPIES
    return tile + tokens * shape.hidden_size * FLOAT32 * LOGPROB_SUMS
