"""Memory of training: weights, gradients, optimizer state, activations. From the config alone.

Optimizer, as the report has it (section 2.4): AdamW updates the embedding, the head, every norm, and the
hyper-connections' biases and gating factors; Muon updates the matrices. Two small things the report does
not name are put with AdamW here, for neither is a matrix that multiplies activations: attention sinks and
the compressors' position tables. The routers' balance biases follow a rule of their own and hold no state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dsv4.accounting.tensors import TensorSpec, inventory, total_bytes
from dsv4.config.model import LayerKind, ModelConfig

Optimizer = Literal["muon", "adamw", "none"]

STATE_BYTES: dict[Optimizer, int] = {"muon": 4, "adamw": 8, "none": 0}
"""F32 state per parameter: Muon one momentum, AdamW two moments."""

MASTER_BYTES = 4  # F32 copy the optimizer updates
GRADIENT_BYTES = 4  # gradients accumulate in F32
BF16_BYTES, F32_BYTES, INDEX_BYTES = 2, 4, 4


@dataclass(frozen=True, kw_only=True)
class TrainingMemory:
    """Bytes a training step needs, activations excluded."""

    weights_bytes: int  # BF16, or F32 for what is stored in F32
    master_bytes: int
    gradient_bytes: int
    muon_bytes: int
    adamw_bytes: int

    @property
    def total_bytes(self) -> int:
        return sum(vars(self).values())


def optimizer_of(tensor: TensorSpec) -> Optimizer:
    """Say which optimizer updates a tensor."""
    if tensor.kind == "hash_table" or tensor.role == "scale" or tensor.name.endswith("gate.bias"):
        return "none"
    if tensor.role == "matrix" and tensor.kind != "head":
        return "muon"
    return "adamw"


def weights_bytes(config: ModelConfig) -> int:
    """Return the bytes of all weights as stored, scales and tables included."""
    return total_bytes(inventory(config))


def training_memory(config: ModelConfig) -> TrainingMemory:
    """Add up weights (widened to BF16), F32 master weights, F32 gradients and optimizer state."""
    counts: dict[Optimizer, int] = {"muon": 0, "adamw": 0, "none": 0}
    weights = 0
    for tensor in inventory(config):
        counts[optimizer_of(tensor)] += tensor.parameters
        if tensor.role != "scale":
            wide = tensor.dtype not in ("F32", "I64")
            weights += BF16_BYTES * tensor.parameters if wide else tensor.num_bytes
    learned = counts["muon"] + counts["adamw"]
    return TrainingMemory(
        weights_bytes=weights,
        master_bytes=MASTER_BYTES * learned,
        gradient_bytes=GRADIENT_BYTES * learned,
        muon_bytes=STATE_BYTES["muon"] * counts["muon"],
        adamw_bytes=STATE_BYTES["adamw"] * counts["adamw"],
    )


def border_bytes_per_token(config: ModelConfig) -> int:
    """Return the bytes per token kept for one layer that is recomputed in the backward pass: its N streams, BF16."""
    return BF16_BYTES * config.hyper_connections.streams * config.hidden_size


def layer_bytes_per_token(config: ModelConfig, kind: LayerKind) -> int:
    """Return the bytes per token one layer keeps for its backward pass when nothing in it is recomputed.

    Each product keeps its input, each nonlinearity what its derivative needs; scores and probabilities of core
    attention are not kept (only their log-sum), nor are the indexer's scores (only the ids picked).
    """
    return _stream_bytes(config) + _attention_bytes(config) + _compressed_bytes(config, kind) + _moe_bytes(config)


def activation_bytes(config: ModelConfig, tokens: int, recompute: bool) -> int:
    """Estimate the activation bytes of one step over ``tokens`` tokens on one device.

    With ``recompute`` each layer keeps its border and one layer at a time is live in full; without, every layer is
    live. The embedding, the head in chunks and the loss add little and are left out.
    """
    kinds = (*config.layer_kinds, *config.mtp_kinds)
    live = [layer_bytes_per_token(config, kind) for kind in kinds]
    if recompute:
        return tokens * (len(kinds) * border_bytes_per_token(config) + max(live))
    return tokens * sum(live)


def _stream_bytes(config: ModelConfig) -> int:
    """Around attention and around the experts: streams in, coefficients in F32, the mix, its norm, the result."""
    N, D = config.hyper_connections.streams, config.hidden_size
    return 2 * (BF16_BYTES * (N * D + 3 * D) + F32_BYTES * N * (N + 2))


def _attention_bytes(config: ModelConfig) -> int:
    """Query latent before and after its norm, queries before and after theirs, key-value twice, output, log-sums."""
    a = config.attention
    wide = a.num_heads * a.head_dim
    low = 2 * a.q_rank + 2 * a.head_dim + a.o_groups * a.o_rank
    return BF16_BYTES * (low + 3 * wide) + F32_BYTES * a.num_heads


def _compressed_bytes(config: ModelConfig, kind: LayerKind) -> int:
    """Projection and gate of the compressors in F32; for CSA also indexer queries, head weights and picked ids."""
    K, J, heads = config.attention.head_dim, config.indexer.head_dim, config.indexer.num_heads
    if kind == "window":
        return 0
    if kind == "hca":
        return 2 * F32_BYTES * K
    return 2 * F32_BYTES * 2 * (K + J) + BF16_BYTES * (heads * J + heads) + INDEX_BYTES * config.indexer.top_k


def _moe_bytes(config: ModelConfig) -> int:
    """Router scores in F32; per expert used, shared one included: input, gate, up, their product, output."""
    moe = config.moe
    per_expert = BF16_BYTES * (2 * config.hidden_size + 3 * moe.expert_dim)
    return F32_BYTES * moe.num_experts + (moe.experts_per_token + 1) * per_expert
