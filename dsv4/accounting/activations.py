"""What a training step keeps for its backward pass, by the model's own rules. From the config alone.

Kept are the inputs of matrix products and what the backward of each fused operation needs; attention scores, index
scores, Sinkhorn rounds and logits are formed again, and so are the streams between a layer's two sub-layers and the
shared expert's activation. A test holds these sums to what autograd keeps.

``width`` below is the bytes of an activation: 2 in bfloat16, 4 in float32. Coefficients, statistics, what compressors
pool and the router's affinities are float32 always.
"""

from __future__ import annotations

from dsv4.config.model import RATIO, LayerKind, ModelConfig

F32, I64 = 4, 8  # bytes


def activation_bytes(config: ModelConfig, tokens: int, width: int = 2) -> int:
    """Return the activation bytes of one step over ``tokens`` tokens on one device, MTP block included.

    Where a group of an expert's tokens is filled up to whole rows, and where an entry is cut short, a few rows more
    or fewer are kept than counted here.
    """
    per_token = sum(layer_bytes_per_token(config, kind, width) for kind in config.layer_kinds)
    per_token += _readout_bytes(config, width)
    for kind in config.mtp_kinds:
        per_token += layer_bytes_per_token(config, kind, width) + _join_bytes(config, width)
        per_token += _readout_bytes(config, width)
    return round(tokens * per_token)


def layer_bytes_per_token(config: ModelConfig, kind: LayerKind, width: int = 2) -> float:
    """Return the bytes per token that one layer keeps; entries are shared by the tokens they stand for."""
    return (
        _streams_bytes(config, width)
        + _attention_bytes(config, width)
        + _entry_bytes(config, kind, width)
        + _experts_bytes(config, width)
    )


def _streams_bytes(config: ModelConfig, width: int) -> int:
    """The layer's N streams; and for each sub-layer its mixes, norm, post and comb, its input and its output."""
    N, D = config.hyper_connections.streams, config.hidden_size
    return width * N * D + 2 * (F32 * (N * (2 + N) + 1 + N + N * N) + width * 2 * D)


def _attention_bytes(config: ModelConfig, width: int) -> int:
    """The query latent and the key-value before and after their norms, queries, output and its low rank; statistics."""
    a = config.attention
    wide = a.num_heads * a.head_dim
    kept = 2 * a.q_rank + 2 * a.head_dim + 2 * wide + a.o_groups * a.o_rank
    return width * kept + F32 * (2 + 2 * a.num_heads)


def _entry_bytes(config: ModelConfig, kind: LayerKind, width: int) -> float:
    """The pooled slots and their weights, the entries before and after their norm, and the picks."""
    if kind == "window":
        return 0
    K, ratio = config.attention.head_dim, RATIO[kind]
    slots = 2 if kind == "csa" else 1  # each token is pooled into two entries, or one
    kept = F32 * 2 * slots * K + (width * 2 * K + F32) / ratio
    return kept + (I64 * config.indexer.top_k if kind == "csa" else 0)


def _experts_bytes(config: ModelConfig, width: int) -> int:
    """The router's affinities in three forms, its choice and weights; gate and up of each expert used."""
    moe = config.moe
    A = moe.experts_per_token
    router = F32 * (3 * moe.num_experts + 3 * A + 1) + I64 * 3 * A
    return router + width * 2 * moe.expert_dim * (A + 1)


def _readout_bytes(config: ModelConfig, width: int) -> int:
    """The last streams with their fold, and the hidden state with its gradient, formed with the loss."""
    N, D = config.hyper_connections.streams, config.hidden_size
    return width * (N * D + 2 * D) + F32 * (N + 1)


def _join_bytes(config: ModelConfig, width: int) -> int:
    """The MTP block's embedding and streams before and after their norms; the streams before are counted already."""
    N, D = config.hyper_connections.streams, config.hidden_size
    return width * (2 * D + N * D) + F32 * (1 + N)
