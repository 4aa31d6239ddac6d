"""A pool of experts in memory of bounded size, shared by all layers; which ones it holds follows what tokens choose.

Layers hold about the same number of slots. A layer that needs room gives up the expert whose tokens are fewest, older
tokens counting less. What a layer finds in the pool it uses first, then the others from the coldest on, so that passing
through more experts than fit, as a long prompt does, reads no more than it must and leaves the hottest there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import log2, prod
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import nn

ALIGNMENT = 64  # bytes; each tensor of an expert begins on a multiple, as tensors of their own do
# Tokens after which a token counts half. With room for half of the experts of a trained nano that writes Python, longer
# ones find fewer of them, and so does giving up the one that was used least recently.
HALF_LIFE = 32
READ_AHEAD = 8  # experts that a source hears of before they are read

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Layout:
    """Shape and dtype of each tensor of an expert, which lie in one piece of memory."""

    tensors: tuple[tuple[tuple[int, ...], torch.dtype], ...]

    @property
    def num_bytes(self) -> int:
        return sum(end - begin for begin, end in self._spans())

    def views(self, memory: torch.Tensor) -> Tensors:
        """Return the tensors that lie in ``memory``, [num_bytes] uint8."""
        spans = zip(self.tensors, self._spans(), strict=True)
        return tuple(
            memory[begin : begin + prod(shape) * dtype.itemsize].view(dtype).view(shape)
            for (shape, dtype), (begin, _) in spans
        )

    def _spans(self) -> Iterator[tuple[int, int]]:
        begin = 0
        for shape, dtype in self.tensors:
            end = begin + -(-prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
            yield begin, end
            begin = end


class ExpertSource(Protocol):
    """All experts of a layer, in a file or in memory."""

    layout: Layout

    def tensors(self, expert: int) -> Tensors:
        """Return the tensors of an expert where they are, on the CPU; not to be changed."""
        ...

    def read_(self, expert: int, out: Tensors) -> None:
        """Overwrite ``out``, on any device, with an expert's tensors."""
        ...

    def announce(self, experts: Sequence[int]) -> None:
        """Hear which experts will be read next."""
        ...


class PoolCounts(NamedTuple):
    """Since the pool was made: experts found in it, experts read, and their bytes."""

    hits: int = 0
    misses: int = 0
    bytes_read: int = 0

    def since(self, before: PoolCounts) -> PoolCounts:
        """Return what was counted after ``before``."""
        return PoolCounts(*(now - then for now, then in zip(self, before, strict=True)))


class ExpertPool(nn.Module):
    """Room for experts of one layout. memory: [slots, bytes of an expert] uint8, on the device that computes."""

    memory: torch.Tensor

    def __init__(self, layout: Layout, num_bytes: int, num_experts: int) -> None:
        """Take ``num_bytes`` at most, and no more than ``num_experts``, all there are, need."""
        super().__init__()
        slots = min(num_bytes // layout.num_bytes, num_experts)
        if slots < 1:
            raise ValueError(f"expert_bytes is {num_bytes}; expected at least the {layout.num_bytes} of one expert")
        self.layout = layout
        self.register_buffer("memory", torch.empty(slots, layout.num_bytes, dtype=torch.uint8), persistent=False)
        self.counts = PoolCounts()
        self._views = [layout.views(slot) for slot in self.memory]
        self._free = list(range(slots))
        self._held: dict[int, dict[int, int]] = {}  # the slot of each expert that a layer holds
        self._heat: dict[int, dict[int, float]] = {}  # of each expert a layer ever used, see _warm
        self._seen: dict[int, int] = {}  # tokens of each layer

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        before = self.memory
        super()._apply(fn, recurse)
        if self.memory is not before:
            self._views = [self.layout.views(slot) for slot in self.memory]
        return self

    def hold(
        self, layer: int, source: ExpertSource, counts: Mapping[int, int], num_tokens: int
    ) -> Iterator[dict[int, Tensors]]:
        """Yield groups of experts until each of ``counts`` was in one; a group stays until the next is asked for.

        counts: how many of the call's tokens chose an expert.
        """
        if not counts:
            return
        held = self._held.setdefault(layer, {})
        self._warm(layer, counts, num_tokens)
        group = {expert: self._views[held[expert]] for expert in counts if expert in held}
        missing = sorted((expert for expert in counts if expert not in held), key=self._heat[layer].__getitem__)
        hits, misses, bytes_read = self.counts
        self.counts = PoolCounts(hits + len(group), misses, bytes_read)
        source.announce(missing[:READ_AHEAD])
        for i, expert in enumerate(missing):
            source.announce(missing[i + READ_AHEAD : i + READ_AHEAD + 1])
            if not self._make_room(layer, group):
                yield group
                group = {}
                has_room = self._make_room(layer, group)
                assert has_room, f"layer {layer} found no room in {len(self._views)} slots"
            slot = self._free[-1]
            source.read_(expert, self._views[slot])  # an error leaves the slot free
            self._free.pop()
            held[expert], group[expert] = slot, self._views[slot]
            hits, misses, bytes_read = self.counts
            self.counts = PoolCounts(hits, misses + 1, bytes_read + sum(x.nbytes for x in self._views[slot]))
        if group:
            yield group

    def _warm(self, layer: int, counts: Mapping[int, int], num_tokens: int) -> None:
        """Note a call. Heat is log2 of the tokens that chose an expert, each doubled for every HALF_LIFE before it.

        So heats stay as they are while time passes, and compare as if older tokens had faded. A call's tokens count as
        if those of an expert were spread evenly over it.
        """
        seen, heat = self._seen.get(layer, 0) + num_tokens, self._heat.setdefault(layer, {})
        self._seen[layer] = seen
        faded = (1 - 2 ** (-num_tokens / HALF_LIFE)) / (1 - 2 ** (-1 / HALF_LIFE)) / num_tokens
        for expert, count in counts.items():
            fresh = seen / HALF_LIFE + log2(count * faded)
            old = heat.get(expert)
            heat[expert] = fresh if old is None else fresh + log2(1 + 2 ** (old - fresh))

    def _make_room(self, layer: int, kept: Mapping[int, Tensors]) -> bool:
        """Have a free slot for a layer, whose experts ``kept`` stay; say whether there is one.

        Not while one of these is colder than what would have to go: they are done with soon.
        """
        if self._free:
            return True
        held = self._held[layer]
        richest = max(self._held, key=lambda other: len(self._held[other]))
        if held and len(held) + 1 >= len(self._held[richest]):
            richest = layer
        heat = self._heat[richest].__getitem__
        kept = kept if richest == layer else {}
        coldest = min((expert for expert in self._held[richest] if expert not in kept), key=heat, default=None)
        if coldest is None or (kept and heat(coldest) > min(map(heat, kept))):
            return False
        self._free.append(self._held[richest].pop(coldest))
        return True
