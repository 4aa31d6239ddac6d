"""Memory of training: weights, gradients, optimizer state. From the config alone; activations beside it.

Optimizer, as the report has it (section 2.4): AdamW updates the embedding, the head, every norm, and the
hyper-connections' biases and gating factors; Muon updates the matrices. Two small things the report does
not name are put with AdamW here, for neither is a matrix that multiplies activations: attention sinks and
the compressors' position tables. The routers' balance biases follow a rule of their own and hold no state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dsv4.accounting.tensors import TensorSpec, inventory, total_bytes
from dsv4.config.model import ModelConfig

Optimizer = Literal["muon", "adamw", "none"]

STATE_BYTES: dict[Optimizer, int] = {"muon": 4, "adamw": 8, "none": 0}
"""F32 state per parameter: Muon one momentum, AdamW two moments."""

MASTER_BYTES = 4  # F32 copy the optimizer updates
GRADIENT_BYTES = 4  # gradients accumulate in F32
BF16_BYTES = 2


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
