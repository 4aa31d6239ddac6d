"""FLOPs of an optimiser step: the products of the Newton-Schulz iteration (report 2.4). Everything else is linear.

A step of the iteration on a matrix of n rows and m >= n columns (else transposed) forms X X^T, 2 n n m FLOPs; its
square, 2 n n n; and the product with X, 2 n n m. That X X^T is symmetric is not made use of.
"""

from __future__ import annotations

from dsv4.accounting.memory import optimizer_of
from dsv4.accounting.tensors import TensorSpec, inventory
from dsv4.config.model import ModelConfig

NEWTON_SCHULZ_STEPS = 10  # report 2.4: eight and two


def newton_schulz_flops(config: ModelConfig, *, per_head: bool) -> int:
    """Count the FLOPs of orthogonalising every matrix of Muon once, the MTP block's included.

    per_head: query matrices are orthogonalised head by head, the indexer's too.
    """
    total = 0
    for tensor in inventory(config):
        if optimizer_of(tensor) == "muon":
            number = _number(config, tensor, per_head)
            rows, columns = tensor.logical_shape
            n, m = sorted((rows // number, columns))
            total += number * (4 * n * n * m + 2 * n**3)
    return NEWTON_SCHULZ_STEPS * total


def _number(config: ModelConfig, tensor: TensorSpec, per_head: bool) -> int:
    """Into how many independent matrices the rows of a tensor divide; experts are tensors of their own here."""
    if tensor.name.endswith("wo_a.weight"):
        return config.attention.o_groups
    if tensor.name.endswith("wq_b.weight") and per_head:
        return config.indexer.num_heads if tensor.kind == "indexer" else config.attention.num_heads
    return 1
