"""The matrices of experts, in numbers or in codes, and experts that lie anywhere: in a mapped file, or in a pool."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol, Self

import torch

from dsv4.ops.linear.portable import Weight
from dsv4.ops.lowbit import Kind, Packed

CODES = torch.uint8  # the dtype of a store in codes
Addresses = ctypes.Array[ctypes.c_void_p]


class Matrices(NamedTuple):
    """The three maps of an expert, w1 [F, D], w2 [D, F] and w3 [F, D], or stacks of those of E experts, [E, ...].

    parts: w1, w2 and w3; in codes of a ``kind`` their codes, and then their scales, shaped as ``Packed`` says.
    """

    parts: tuple[torch.Tensor, ...]
    kind: Kind | None = None

    @classmethod
    def of_codes(cls, w1: Packed, w2: Packed, w3: Packed) -> Self:
        """Put matrices of one kind, with scales of one dtype, together."""
        forms = [(w.kind, w.scales.dtype) for w in (w1, w2, w3)]
        if len(set(forms)) > 1:
            raise ValueError(f"w1, w2 and w3 are codes and scales of {forms}; expected one kind and one dtype")
        return cls(tuple(w.codes for w in (w1, w2, w3)) + tuple(w.scales for w in (w1, w2, w3)), w1.kind)

    @property
    def weights(self) -> tuple[Weight, ...]:
        """w1, w2 and w3 as ``dsv4.ops.linear`` takes them."""
        if self.kind is None:
            return self.parts
        pairs = zip(self.parts[:3], self.parts[3:], strict=True)
        return tuple(Packed(codes, scales, self.kind) for codes, scales in pairs)

    @property
    def shapes(self) -> list[list[int]]:
        """Of the three maps, whatever they are in."""
        return [list(w.shape) for w in self.weights]

    def one(self, expert: int) -> Matrices:
        """Return those of one expert of stacks."""
        return Matrices(tuple(part[expert] for part in self.parts), self.kind)


class Table:
    """Some of a layer's experts, at least one, by their numbers: contiguous, and all in one dtype or kind of codes."""

    def __init__(self, num_experts: int, matrices: Mapping[int, Matrices]) -> None:
        self.num_experts, self.matrices = num_experts, matrices
        self._addresses: dict[tuple[int, ...], list[Addresses]] = {}

    @property
    def any(self) -> Matrices:
        """One of them, to see what all are in."""
        return next(iter(self.matrices.values()))

    def addresses(self, shared: Sequence[int]) -> list[Addresses]:
        """Of each part of the matrices the address for each of E experts, null where it is not here, and of ``shared``.

        shared: an address for each part. For one ``shared`` the same arrays at every call.
        """
        key = tuple(shared)
        found = self._addresses.get(key)
        if found is None:
            found = [(ctypes.c_void_p * (self.num_experts + 1))() for _ in key]
            for expert, matrices in self.matrices.items():
                for array, part in zip(found, matrices.parts, strict=True):
                    array[expert] = part.data_ptr()
            for array, address in zip(found, key, strict=True):
                array[self.num_experts] = address
            self._addresses[key] = found
        return found


class ExpertStore(Protocol):
    """The experts of a layer, wherever they are kept: all in one dtype, or in one kind of codes."""

    @property
    def sizes(self) -> tuple[int, int, int]:
        """E, F and D."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of the numbers, or ``CODES``."""
        ...

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


def of_store(store: ExpertStore, counts: Mapping[int, int], num_tokens: int) -> Iterator[tuple[int, Matrices]]:
    """Yield each expert of ``counts`` with its matrices, which are good until the next is asked for."""
    for table in store.tables(counts, num_tokens):
        for expert in counts.keys() & table.matrices.keys():
            yield expert, table.matrices[expert]
