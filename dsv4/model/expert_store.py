"""Routed experts that are no parameters: left where a file was mapped, or in a pool that holds the hot ones.

They stand in the place of ``Experts`` and compute the same, without a gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from dsv4.device import is_accelerator
from dsv4.model.expert_pool import ExpertPool, ExpertSource, Layout, Tensors
from dsv4.ops.backend import Backend
from dsv4.ops.experts import stored_experts
from dsv4.ops.experts.store import Matrices, Table
from dsv4.ops.lowbit import Kind


class StoredExperts(nn.Module):
    """The experts of one layer, and an ``ExpertStore`` of the operations. The source has the parts of ``Matrices``.

    Without a pool they are used where the source has them. sizes: E, F and D. kind: of their codes, None for numbers.
    layer: its number in the pool.
    """

    def __init__(
        self,
        source: ExpertSource,
        sizes: tuple[int, int, int],
        *,
        kind: Kind | None,
        layer: int,
        pool: ExpertPool | None,
    ) -> None:
        super().__init__()
        E, F, D = sizes
        parts = tuple(torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in source.layout.tensors)
        shapes, wanted = Matrices(parts, kind).shapes, [[F, D], [D, F], [F, D]]
        if shapes != wanted:
            raise ValueError(f"experts have matrices of shapes {shapes}; expected {wanted}")
        self.source, self.sizes, self.layer, self.pool = source, sizes, layer, pool
        self.kind: Kind | None = kind
        self.dtype = parts[0].dtype
        self.whole = None if pool is not None else self._table({e: source.tensors(e) for e in range(E)})

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.pool is None else self.pool.memory.device

    def tables(self, counts: Mapping[int, int], num_tokens: int) -> Iterator[Table]:
        """See ``ExpertStore``."""
        if self.whole is not None:
            yield self.whole
        if self.pool is not None:
            for held in self.pool.hold(self.layer, self.source, counts, num_tokens):
                yield self._table(held)

    def run(
        self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, limit: float, backend: Backend
    ) -> torch.Tensor:
        """See ``Experts``."""
        return stored_experts(x, chosen, weights, self, limit, backend=backend)

    def run_with_shared(
        self,
        x: torch.Tensor,
        chosen: torch.Tensor,
        weights: torch.Tensor,
        shared: Matrices,
        limit: float,
        backend: Backend,
    ) -> torch.Tensor:
        """See ``Experts``."""
        return stored_experts(x, chosen, weights, self, limit, shared=shared, backend=backend)

    def _table(self, held: Mapping[int, Tensors]) -> Table:
        return Table(self.sizes[0], {expert: Matrices(parts, self.kind) for expert, parts in held.items()})


class MemoryExperts:
    """Experts in CPU memory, from which an accelerator's pool is filled. memory: [E, bytes of an expert] uint8."""

    def __init__(self, layout: Layout, memory: torch.Tensor) -> None:
        self.layout, self.memory = layout, memory

    def tensors(self, expert: int) -> Tensors:
        """See ``ExpertSource``."""
        return self.layout.views(self.memory[expert])

    def read_(self, expert: int, out: Tensors) -> None:
        """See ``ExpertSource``. Copies to an accelerator come from pinned memory, in the order of its own work."""
        if is_accelerator(out[0].device) and not self.memory.is_pinned():
            self.memory = self.memory.pin_memory()
        for to, tensor in zip(out, self.tensors(expert), strict=True):
            to.copy_(tensor, non_blocking=True)

    def announce(self, experts: Sequence[int]) -> None:
        """See ``ExpertSource``. They are there already."""
