"""DeepSeek-V3.2, the model V4 is compared with: its public sizes and what one token costs it.

V3.2 has multi-head latent attention (one latent vector and one rotary key per token and layer) and a
lightning indexer that scores every earlier token and keeps 2048. Costs follow the conventions of
``dsv4.accounting.flops``: matrix products only, 2 FLOPs a multiply-add, the rates of ``RATE``.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsv4.accounting.cost import Cost


@dataclass(frozen=True, kw_only=True)
class V32Config:
    """Sizes of DeepSeek-V3.2-Exp as published in its config.json."""

    vocab_size: int = 129280
    hidden_size: int = 7168
    num_layers: int = 61
    num_dense_layers: int = 3
    dense_dim: int = 18432
    num_experts: int = 256
    experts_per_token: int = 8
    num_shared_experts: int = 1
    expert_dim: int = 2048
    num_heads: int = 128
    q_rank: int = 1536
    kv_rank: int = 512
    nope_dims: int = 128
    rotary_dims: int = 64
    value_dims: int = 128
    index_heads: int = 64
    index_head_dim: int = 128
    index_top_k: int = 2048

    @property
    def num_moe_layers(self) -> int:
        return self.num_layers - self.num_dense_layers

    @property
    def latent_row_bytes(self) -> int:
        """FP8 latent, one F32 scale per 128 channels, BF16 rotary key: 512 + 16 + 128 = 656."""
        return self.kv_rank + 4 * self.kv_rank // 128 + 2 * self.rotary_dims

    @property
    def index_row_bytes(self) -> int:
        """FP8 key and one F32 scale: 128 + 4 = 132."""
        return self.index_head_dim + 4


def kv_bytes_per_token(config: V32Config) -> int:
    """Return the cache bytes one token adds: (656 + 132) x 61 = 48,068."""
    return config.num_layers * (config.latent_row_bytes + config.index_row_bytes)


def attention_matrix_parameters(config: V32Config) -> tuple[int, int]:
    """Return the parameters of one layer's attention matrices: those multiplied in FP8, and in BF16.

    Decoding absorbs the up-projection of keys into the query and that of values into the output; both are
    then multiplied head by head in BF16, and cost one multiply-add per parameter as before.
    """
    D, H = config.hidden_size, config.num_heads
    query = D * config.q_rank + config.q_rank * H * (config.nope_dims + config.rotary_dims)
    latent = D * (config.kv_rank + config.rotary_dims)
    output = H * config.value_dims * D
    absorbed = config.kv_rank * H * (config.nope_dims + config.value_dims)
    return query + latent + output, absorbed


def indexer_matrix_parameters(config: V32Config) -> tuple[int, int]:
    """Return the parameters of one layer's indexer matrices: in FP8 (query, key), and in BF16 (head weights)."""
    width = config.index_heads * config.index_head_dim
    return config.q_rank * width + config.hidden_size * config.index_head_dim, config.hidden_size * config.index_heads


def matrix_parameters(config: V32Config) -> tuple[int, int]:
    """Return all matrix parameters, embedding included, and those one token multiplies."""
    D = config.hidden_size
    expert = 3 * D * config.expert_dim
    per_layer = sum(attention_matrix_parameters(config)) + sum(indexer_matrix_parameters(config))
    shared = (
        config.num_layers * per_layer
        + config.num_dense_layers * 3 * D * config.dense_dim
        + config.num_moe_layers * (D * config.num_experts + config.num_shared_experts * expert)
        + config.vocab_size * D
    )
    total = shared + config.vocab_size * D + config.num_moe_layers * config.num_experts * expert
    return total, shared + config.num_moe_layers * config.experts_per_token * expert


def decode(config: V32Config, context: int) -> tuple[Cost, ...]:
    """Cost one decoded token that sees ``context`` tokens, itself included."""
    D, L = config.hidden_size, config.num_layers
    fp8, absorbed = attention_matrix_parameters(config)
    index_fp8, index_bf16 = indexer_matrix_parameters(config)
    expert = 3 * D * config.expert_dim
    attended = min(context, config.index_top_k)
    key_width = config.kv_rank + config.rotary_dims
    scores = config.index_heads * config.index_head_dim * context
    return (
        Cost(kind="projections", flops=2 * L * fp8, precision="fp8"),
        Cost(kind="projections", flops=2 * L * absorbed, precision="bf16"),
        Cost(
            kind="attention", flops=2 * L * config.num_heads * attended * (key_width + config.kv_rank), precision="bf16"
        ),
        Cost(kind="indexer", flops=2 * L * (index_fp8 + scores), precision="fp8"),
        Cost(kind="indexer", flops=2 * L * (index_bf16 + config.index_heads * context), precision="bf16"),
        Cost(
            kind="experts",
            flops=2 * config.num_moe_layers * config.experts_per_token * expert
            + 2 * config.num_dense_layers * 3 * D * config.dense_dim,
            precision="fp8",
        ),
        Cost(kind="shared", flops=2 * config.num_moe_layers * config.num_shared_experts * expert, precision="fp8"),
        Cost(kind="router", flops=2 * config.num_moe_layers * D * config.num_experts, precision="bf16"),
        Cost(kind="head", flops=2 * D * config.vocab_size, precision="bf16"),
    )
