"""Experts that lie anywhere, each matrix by itself: in a mapped file, or in a pool that holds a few of them."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from typing import Protocol

import torch

Matrices = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # w1, w2 and w3
Addresses = ctypes.Array[ctypes.c_void_p]


class Table:
    """Some of a layer's experts, by their numbers: w1 [F, D], w2 [D, F] and w3 [F, D] of each, contiguous."""

    def __init__(self, num_experts: int, matrices: Mapping[int, Matrices]) -> None:
        self.num_experts, self.matrices = num_experts, matrices
        self._addresses: dict[tuple[int, ...], tuple[Addresses, ...]] = {}

    def addresses(self, shared: tuple[int, int, int]) -> tuple[Addresses, ...]:
        """Of w1, w2 and w3 the address of each of E experts, null where it is not here, and last that of ``shared``.

        For one ``shared`` the same arrays at every call.
        """
        found = self._addresses.get(shared)
        if found is None:
            found = tuple((ctypes.c_void_p * (self.num_experts + 1))() for _ in range(3))
            for expert, matrices in self.matrices.items():
                for array, matrix in zip(found, matrices, strict=True):
                    array[expert] = matrix.data_ptr()
            for array, address in zip(found, shared, strict=True):
                array[self.num_experts] = address
            self._addresses[shared] = found
        return found


class ExpertStore(Protocol):
    """The experts of a layer, wherever they are kept. All matrices have one dtype."""

    @property
    def sizes(self) -> tuple[int, int, int]:
        """E, F and D."""
        ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device:
        """Of the matrices that the tables give."""
        ...

    @property
    def whole(self) -> Table | None:
        """All experts, the same table at every call; None where they are not all in memory at once."""
        ...

    def tables(self, counts: Mapping[int, int], num_tokens: int) -> Iterator[Table]:
        """Yield tables which together hold each expert of ``counts`` once; one is good until the next is asked for.

        counts: how many of a call's tokens chose an expert.
        """
        ...


def needed(chosen: torch.Tensor, num_experts: int) -> dict[int, int]:
    """Return how many tokens chose each expert that any chose. chosen: [T, A]."""
    experts, counts = chosen.unique(return_counts=True)
    found = dict(zip(experts.tolist(), counts.tolist(), strict=True))
    if found and not 0 <= min(found) <= max(found) < num_experts:
        raise ValueError(f"chosen holds {min(found)} to {max(found)}; expected experts from 0 to {num_experts - 1}")
    return found
