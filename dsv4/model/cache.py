"""The cache of an engine: what every running sequence carries, in slots and pages (report 3.6, spec section 6).

A slot is a fixed block: rings of the window's raw rows and of the compressors' projections, token p at p modulo their
length. Compressed entries and indexer keys lie in pages that sequences may share. A ring has ``spare`` places more
than its readers need, so that a sequence goes back by as many tokens by being shorter: what it still needs was not
overwritten.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from dsv4.accounting import cache as sizes
from dsv4.config.model import RATIO, LayerKind, ModelConfig
from dsv4.model.call import frequencies
from dsv4.native.large_pages import prefer_large_pages
from dsv4.ops.places import PAGE_TOKENS, Arrangement, Places, arrange, places_of
from dsv4.ops.rows import RowFormat


class CompressorCache:
    """One compressor's tails, [num_slots, L, E] float32 twice, and pages, [num_pages, n, bytes] uint8."""

    def __init__(self, kv: torch.Tensor, gate: torch.Tensor, pages: torch.Tensor) -> None:
        self.kv, self.gate, self.pages = kv, gate, pages

    def num_bytes(self) -> int:
        return self.kv.nbytes + self.gate.nbytes + self.pages.nbytes


class LayerCache:
    """One layer's ring, [num_slots, R, bytes] uint8, and its compressors; None where its kind has none."""

    def __init__(self, ring: torch.Tensor, compressor: CompressorCache | None, indexer: CompressorCache | None) -> None:
        self.ring, self.compressor, self.indexer = ring, compressor, indexer

    def compressors(self) -> list[CompressorCache]:
        return [c for c in (self.compressor, self.indexer) if c is not None]

    def num_bytes(self) -> int:
        return self.ring.nbytes + sum(c.num_bytes() for c in self.compressors())


class Cache:
    """All layers, the MTP block's after the model's own. Memory is taken when it is made, and none later.

    num_slots: sequences that run at once. num_pages: of PAGE_TOKENS tokens each, for all of them. spare: tokens that a
    sequence can go back by. Raises ``ValueError`` for a count below 1.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_slots: int,
        num_pages: int,
        row_format: RowFormat,
        spare: int = 0,
        max_context: int | None = None,
        device: torch.device | None = None,
    ) -> None:
        for name, value, least in (("num_slots", num_slots, 1), ("num_pages", num_pages, 1), ("spare", spare, 0)):
            if value < least:
                raise ValueError(f"{name} is {value}; expected at least {least}")
        self.config, self.spare = config, spare
        self.row_format: RowFormat = row_format
        self.num_slots, self.num_pages = num_slots, num_pages
        max_pages = -(-(config.max_context if max_context is None else max_context) // PAGE_TOKENS)
        self.table = torch.zeros(num_slots, max_pages, dtype=torch.int32, device=device)
        self._ratios = sorted({RATIO[kind] for kind in config.layer_kinds} - {0})
        self.layers = [self._layer(kind, device) for kind in (*config.layer_kinds, *config.mtp_kinds)]
        plain, compressed = frequencies(config)
        self.frequencies = plain.to(self.table.device), compressed.to(self.table.device)  # formed once for all steps
        prefer_large_pages(c.pages for layer in self.layers for c in layer.compressors())

    def _layer(self, kind: LayerKind, device: torch.device | None) -> LayerCache:
        a = self.config.attention
        row = sizes.row_bytes(self.config, self.row_format)
        ring = torch.zeros(self.num_slots, a.window + self.spare, row, dtype=torch.uint8, device=device)
        compressor = None if kind == "window" else self._compressor(kind, a.head_dim, row, device)
        indexer = None
        if kind == "csa":
            key = sizes.index_row_bytes(self.config, self.row_format)
            indexer = self._compressor(kind, self.config.indexer.head_dim, key, device)
        return LayerCache(ring, compressor, indexer)

    def _compressor(self, kind: LayerKind, width: int, row: int, device: torch.device | None) -> CompressorCache:
        ratio = RATIO[kind]
        overlaps = 2 if kind == "csa" else 1
        tail = (self.num_slots, overlaps * ratio + self.spare, overlaps * width)
        kv, gate = (torch.zeros(tail, dtype=torch.float32, device=device) for _ in range(2))
        pages = torch.zeros(self.num_pages, PAGE_TOKENS // ratio, row, dtype=torch.uint8, device=device)
        return CompressorCache(kv, gate, pages)

    def num_bytes(self) -> int:
        """Return the memory held, in bytes, without the table."""
        return sum(layer.num_bytes() for layer in self.layers)

    # ---- places ----

    def places(self, sequences: Sequence[tuple[int, int, int, int]]) -> Places:
        """Place the tokens of a step.

        sequences: slot, position of the first token, number of tokens, and the position from which entries are
        written, of each sequence. Blocks that close before that position are in shared pages already.
        """
        shape, numbers = self.arrange(sequences)
        return self.places_of(shape, torch.tensor(numbers, dtype=torch.int32, device=self.table.device))

    def arrange(
        self, sequences: Sequence[tuple[int, int, int, int]], *, fills: bool = False
    ) -> tuple[Arrangement, list[int]]:
        """The same in two halves: the shape of the places and their numbers. fills: see ``dsv4.ops.places.arrange``."""
        return arrange(sequences, self._ratios, fills=fills)

    def places_of(self, shape: Arrangement, numbers: torch.Tensor) -> Places:
        """Return the places that numbers of this shape stand for, as views of them."""
        return places_of(shape, numbers, self.table)

    # ---- states: what a slot holds at a page boundary ----

    def state(self, slot: int) -> list[torch.Tensor]:
        """Return copies of what ``slot`` needs to go on from a page boundary: rings, and the tails that overlap.

        An HCA block is complete there, and leaves nothing to carry.
        """
        return [part[slot].clone() for part in self._carried()]

    def load_state(self, slot: int, state: Sequence[torch.Tensor] | None) -> None:
        """Put a state into a slot; None empties it."""
        if state is None:
            for part in self._carried():
                part[slot] = 0
            return
        for part, saved in zip(self._carried(), state, strict=True):
            part[slot] = saved

    def state_like(self) -> list[torch.Tensor]:
        """Return tensors, on the CPU, that a state can be read into."""
        return [torch.empty(part[0].shape, dtype=part.dtype) for part in self._carried()]

    def state_bytes(self) -> int:
        """Return the bytes of one state."""
        return sum(part[0].nbytes for part in self._carried())

    def _carried(self) -> Iterator[torch.Tensor]:
        for layer in self.layers:
            yield layer.ring
            if layer.indexer is not None:
                for compressor in layer.compressors():
                    yield compressor.kv
                    yield compressor.gate

    # ---- pages ----

    def page(self, page: int) -> list[torch.Tensor]:
        """Return the parts of a page, one of each compressor: views, [n, bytes] uint8."""
        return [c.pages[page] for layer in self.layers for c in layer.compressors()]

    def page_bytes(self) -> int:
        """Return the bytes of one page."""
        return sum(part.nbytes for part in self.page(0))
