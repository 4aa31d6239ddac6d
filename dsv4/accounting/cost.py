"""A number of FLOPs with what it was spent on and in which precision, and the exchange rate between them.

The report compares models in FP8-equivalent FLOPs (figure 1). One FLOP of an FP8 product counts 1, of a
BF16 product 2, of an FP4 product 0.5: the ratio of operand bits, and of peak rates on hardware that
has all three. Products whose operands are stored in F32 count as BF16, the narrowest type that holds
the BF16 activations they multiply.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Precision = Literal["fp4", "fp8", "bf16"]

RATE: dict[Precision, float] = {"fp4": 0.5, "fp8": 1.0, "bf16": 2.0}
"""FP8-equivalent FLOPs of one FLOP."""

CostKind = Literal[
    "projections",
    "attention",
    "compressor",
    "indexer",
    "experts",
    "shared",
    "router",
    "hyper_connections",
    "head",
    "mtp",
]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """FLOPs of one kind in one precision; 2 FLOPs a multiply-add."""

    kind: CostKind
    flops: int
    precision: Precision

    @property
    def fp8_equivalent(self) -> float:
        return self.flops * RATE[self.precision]


def total_flops(costs: Iterable[Cost]) -> int:
    """Sum raw FLOPs."""
    return sum(cost.flops for cost in costs)


def total_fp8_equivalent(costs: Iterable[Cost]) -> float:
    """Sum FLOPs in FP8-equivalents."""
    return sum(cost.fp8_equivalent for cost in costs)


def flops_by_kind(costs: Iterable[Cost]) -> dict[CostKind, int]:
    """Sum raw FLOPs kind by kind."""
    result: dict[CostKind, int] = {}
    for cost in costs:
        result[cost.kind] = result.get(cost.kind, 0) + cost.flops
    return result
