"""A shape small enough to count by hand."""

from align.plan.shape import AdaptedLinear, ModelShape

# A layer: q 8 → 8, k and v 8 → 4, o 8 → 8; gate and up 8 → 16, down 16 → 8.
_ADAPTED = tuple(
    AdaptedLinear(*features, layer=layer, shares_input=shares)
    for layer in range(2)
    for features, shares in (
        ((8, 8), False), ((8, 4), True), ((8, 4), True), ((8, 8), False),
        ((8, 16), False), ((8, 16), True), ((16, 8), False),
    )
)  # fmt: skip
SMALL = ModelShape(
    num_layers=2,
    num_frozen_layers=0,
    hidden_size=8,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    mlp_width=16,
    is_gated=True,
    has_kernels=False,
    vocabulary=32,
    context_length=None,
    # 2 · (64 + 32 + 32 + 64 + 3 · 128) products, embeddings 32 · 8 (tied), norms (2 · 2 + 1) · 8
    num_parameters=1152 + 256 + 40,
    num_matmul_parameters=1152,
    stored_bytes=2,
    auto_bytes=2,
    adapted=_ADAPTED,
)
