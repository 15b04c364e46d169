"""What a forecast has to know of a base model and of the places of its LoRA adapters: counts, no weights, no torch."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class AdaptedLinear:
    """A linear layer that every adapter has two low-rank matrices on."""

    in_features: int
    out_features: int
    layer: int  # the first is 0
    shares_input: bool  # with another before it: q, k and v read one tensor, gate and up another


@dataclass(frozen=True)
class ModelShape:
    """A decoder-only transformer. Layers are taken to be alike, and attention to reach over the whole sequence."""

    num_layers: int
    num_frozen_layers: int  # below the first adapter: without gradients, and the same in every role
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int  # features between the MLP's products that one token passes: of a mixture, its chosen experts' sum
    is_gated: bool  # act(gate) · up between them, instead of act(up)
    has_kernels: bool  # of align.kernels.pointwise, for its norms and gated MLPs, on this machine's CPU
    vocabulary: int
    context_length: int | None  # tokens of a row that it has positions for; None if it does not say
    num_parameters: int  # tied ones once
    num_matmul_parameters: int  # of the decoder layers, that one token is multiplied with
    stored_bytes: int  # a parameter, in the weight files
    auto_bytes: int  # a parameter in memory, where base.dtype is auto
    adapted: tuple[AdaptedLinear, ...]  # in all layers

    def with_adapters_on_last(self, layers: int) -> "ModelShape":
        """The same base with those of its adapters that lie in the last `layers` layers."""
        first = max(self.num_frozen_layers, self.num_layers - layers)
        return replace(self, num_frozen_layers=first, adapted=tuple(x for x in self.adapted if x.layer >= first))

    @property
    def num_learning_layers(self) -> int:
        return self.num_layers - self.num_frozen_layers

    @property
    def query_width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def num_head_parameters(self) -> int:
        """Of a scalar head: its weights and its bias."""
        return self.hidden_size + 1

    def num_lora_parameters(self, rank: int) -> int:
        """Of one adapter: A (rank × in) and B (out × rank) at each place (Hu et al. 2021)."""
        return sum(rank * (linear.in_features + linear.out_features) for linear in self.adapted)
