"""Parameters by kind: how many there are, and how many one token uses.

A token uses every matrix except the embedding (a lookup of one row) and the experts it is not routed to.
Scales and the hash layers' tables of expert ids are not parameters. The MTP block is counted apart: the
284B and 1.6T of the report exclude it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

from dsv4.accounting.tensors import Kind, TensorSpec, inventory
from dsv4.config.model import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Count:
    """Parameters in all, and those one token uses."""

    total: int
    activated: int

    def __add__(self, other: Count) -> Count:
        return Count(total=self.total + other.total, activated=self.activated + other.activated)


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Parameters of a model: the main model by kind, and the MTP block's own weights."""

    by_kind: dict[Kind, Count]
    mtp: Count

    @property
    def main(self) -> Count:
        return sum_counts(self.by_kind.values())

    @property
    def with_mtp(self) -> Count:
        return self.main + self.mtp


def sum_counts(counts: Iterable[Count]) -> Count:
    """Add counts up."""
    return sum(counts, Count(total=0, activated=0))


def activated_share(config: ModelConfig, kind: Kind) -> Fraction:
    """Return the share of a kind's parameters that one token uses."""
    if kind == "embedding":
        return Fraction(0)
    if kind == "routed_experts":
        return Fraction(config.moe.experts_per_token, config.moe.num_experts)
    return Fraction(1)


def parameters(config: ModelConfig) -> Parameters:
    """Count the parameters of a model."""
    tensors = inventory(config)
    main = _by_kind(config, (tensor for tensor in tensors if not tensor.is_mtp))
    mtp = _by_kind(config, (tensor for tensor in tensors if tensor.is_mtp))
    return Parameters(by_kind=main, mtp=sum_counts(mtp.values()))


def _by_kind(config: ModelConfig, tensors: Iterable[TensorSpec]) -> dict[Kind, Count]:
    totals: dict[Kind, int] = {}
    for tensor in tensors:
        if tensor.parameters:
            totals[tensor.kind] = totals.get(tensor.kind, 0) + tensor.parameters
    return {
        kind: Count(total=total, activated=int(total * activated_share(config, kind))) for kind, total in totals.items()
    }
