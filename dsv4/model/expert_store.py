"""Routed experts that are no parameters: left where a file was mapped, or in a pool that holds the hot ones.

They stand in the place of ``Experts`` and compute the same, without a gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from dsv4.model.expert_pool import ExpertPool, ExpertSource, Layout, Tensors
from dsv4.ops.backend import Backend
from dsv4.ops.experts import stored_experts
from dsv4.ops.experts.store import Matrices, Table


class StoredExperts(nn.Module):
    """The experts of one layer, and an ``ExpertStore`` of the operations: w1 [F, D], w2 [D, F] and w3 [F, D] of each.

    Without a pool they are used where the source has them. sizes: E, F and D. layer: its number in the pool.
    """

    def __init__(
        self, source: ExpertSource, sizes: tuple[int, int, int], *, layer: int, pool: ExpertPool | None
    ) -> None:
        super().__init__()
        E, F, D = sizes
        shapes, wanted = tuple(shape for shape, _ in source.layout.tensors), ((F, D), (D, F), (F, D))
        if shapes != wanted:
            raise ValueError(f"experts have tensors of shapes {shapes}; expected {wanted}")
        self.source, self.sizes, self.layer, self.pool = source, sizes, layer, pool
        self.dtype = source.layout.tensors[0][1]
        self.whole = None if pool is not None else Table(E, {e: _matrices(source.tensors(e)) for e in range(E)})

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.pool is None else self.pool.memory.device

    def tables(self, counts: Mapping[int, int], num_tokens: int) -> Iterator[Table]:
        """See ``ExpertStore``."""
        if self.whole is not None:
            yield self.whole
        if self.pool is not None:
            for held in self.pool.hold(self.layer, self.source, counts, num_tokens):
                yield Table(self.sizes[0], {expert: _matrices(tensors) for expert, tensors in held.items()})

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


class MemoryExperts:
    """Experts in CPU memory, from which an accelerator's pool is filled. memory: [E, bytes of an expert] uint8."""

    def __init__(self, layout: Layout, memory: torch.Tensor) -> None:
        self.layout, self.memory = layout, memory

    def tensors(self, expert: int) -> Tensors:
        """See ``ExpertSource``."""
        return self.layout.views(self.memory[expert])

    def read_(self, expert: int, out: Tensors) -> None:
        """See ``ExpertSource``. Copies to an accelerator come from pinned memory, in the order of its own work."""
        if out[0].device.type != "cpu" and not self.memory.is_pinned():
            self.memory = self.memory.pin_memory()
        for to, tensor in zip(out, self.tensors(expert), strict=True):
            to.copy_(tensor, non_blocking=True)

    def announce(self, experts: Sequence[int]) -> None:
        """See ``ExpertSource``. They are there already."""


def _matrices(tensors: Tensors) -> Matrices:
    w1, w2, w3 = tensors
    return w1, w2, w3
