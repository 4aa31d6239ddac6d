"""Paged attention of an engine step: one token of each sequence, and a chunk of a prompt, of Flash and Pro."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.gpu.case import Case
from dsv4.device import best
from dsv4.ops.attend.paged import attend_paged, write_ring_
from dsv4.ops.backend import Backend
from dsv4.ops.places import PAGE_TOKENS, Places
from dsv4.ops.rows import RowFormat, pack, row_bytes

WINDOW, RING, CHANNELS, ROTARY = 128, 132, 512, 64
MODELS = {"flash": (64, 512), "pro": (128, 1024)}  # heads, picks
RATIOS = {"window": 0, "csa": 4, "hca": 128}
FORMATS: tuple[RowFormat, ...] = ("packed", "bfloat16")
BATCHES = (1, 8, 64)
CONTEXTS = {"4K": 4096, "64K": 65536, "1M": 1 << 20}
CHUNK = 2048  # tokens of a prompt in a step
BYTES = 2  # of an element of queries and outputs, bfloat16
BALANCE = 165  # operations a byte of an H200: 790 TFLOP/s of bfloat16 over 4.8 TB/s
POOL_BYTES = 1 << 30  # of pages at most, which sequences share then: many times what a cache on the chip holds
MARK = 0.25  # of the ceiling, where there is work for all multiprocessors: decoding rows takes longer than the products


def cases() -> list[Case]:
    """A token of each of 1, 8 and 64 sequences behind so many tokens, then chunks, then the rings they go into."""
    made = []
    for model in MODELS:
        for row_format in FORMATS:
            for batch in BATCHES:
                made.append(_decoding(model, "window", row_format, batch, "4K"))
                made += [
                    _decoding(model, kind, row_format, batch, context)
                    for kind in ("csa", "hca")
                    for context in CONTEXTS
                ]
            made += [_prompt(model, kind, row_format) for kind in RATIOS]
    return made + [_storing(row_format, tokens) for row_format in FORMATS for tokens in (64, 4096)]


def _decoding(model: str, kind: str, row_format: RowFormat, batch: int, context: str) -> Case:
    mark = MARK if batch == max(BATCHES) else None
    shape = f"{model} {row_format} {batch} x 1 token at {context}"
    return _case(model, kind, row_format, shape, [(CONTEXTS[context] - 1, 1)] * batch, mark)


def _prompt(model: str, kind: str, row_format: RowFormat) -> Case:
    shape = f"{model} {row_format} {CHUNK} tokens to 64K"
    return _case(model, kind, row_format, shape, [(CONTEXTS["64K"] - CHUNK, CHUNK)], MARK)


def _case(
    model: str, kind: str, row_format: RowFormat, shape: str, sequences: list[tuple[int, int]], mark: float | None
) -> Case:
    """sequences: the position of the first token and the number of tokens of each."""
    (heads, picks), ratio, row = MODELS[model], RATIOS[kind], row_bytes(row_format, CHANNELS, ROTARY)
    num_keys = num_rows = 0  # that meet queries; that are read, once for all tokens of a sequence where they can be
    for begin, count in sequences:
        seen = [(p + 1) // ratio if ratio else 0 for p in range(begin, begin + count)]
        entries = [min(n, picks) for n in seen] if kind == "csa" else seen
        num_keys += sum(entries) + count * WINDOW
        num_rows += WINDOW + count - 1 + min(sum(entries), max(seen))
    tokens = sum(count for _, count in sequences)
    num_bytes = num_rows * row + 2 * tokens * heads * CHANNELS * BYTES + tokens * CHANNELS * BYTES
    num_bytes += 4 * tokens * picks if kind == "csa" else 0
    flops = num_keys * heads * 2 * CHANNELS * 2  # two products, scores and values

    def maker(backend: Backend) -> Callable[[], Callable[[], object]]:
        return lambda: _make(heads, picks, kind, row_format, sequences, backend)

    return Case(
        kernel=f"attend.paged.{kind}",
        shape=shape,
        make=maker("unproved"),
        num_bytes=num_bytes,
        flops=flops,
        twins={"portable": maker("portable")},
        mark=mark,
    )


def _make(
    heads: int, picks: int, kind: str, row_format: RowFormat, sequences: list[tuple[int, int]], backend: Backend
) -> Callable[[], object]:
    ratio, tokens = RATIOS[kind], sum(count for _, count in sequences)
    each = PAGE_TOKENS // ratio if ratio else 1
    page_bytes = each * row_bytes(row_format, CHANNELS, ROTARY)
    places = _places(sequences, page_bytes)
    q, kv = _random(tokens, heads, CHANNELS), _random(tokens, CHANNELS)
    ring = _stored(row_format, len(sequences), RING)
    pages, picked = None, None
    if ratio:
        pages = _stored(row_format, _pages(sequences, page_bytes)[1], each)
    if kind == "csa":
        place, end = torch.arange(picks, device=q.device), (places.position + 1)[:, None] // ratio
        spread = torch.where(end > picks, place * end // picks, torch.where(place < end, place, -1))
        picked = spread.int().contiguous()
    sink = torch.zeros(heads, device=q.device)

    def run() -> object:
        return attend_paged(
            q, kv, sink, ring, places, pages=pages, picked=picked, window=WINDOW, ratio=ratio, row_format=row_format,
            rotary_dims=ROTARY, scale=CHANNELS**-0.5, backend=backend,
        )  # fmt: skip

    return run


def _storing(row_format: RowFormat, tokens: int) -> Case:
    sequences = [(5000, 1)] * tokens if tokens < RING else [(5000, tokens)]
    kept = min(tokens, RING) if len(sequences) == 1 else tokens
    num_bytes = kept * (CHANNELS * BYTES + row_bytes(row_format, CHANNELS, ROTARY)) + 12 * tokens

    def maker(backend: Backend) -> Callable[[], Callable[[], object]]:
        def make() -> Callable[[], object]:
            places, kv, ring = (
                _places(sequences, 1),
                _random(tokens, CHANNELS),
                _stored(row_format, len(sequences), RING),
            )
            how = {"row_format": row_format, "rotary_dims": ROTARY, "backend": backend}
            return lambda: write_ring_(kv, ring, places, **how)

        return make

    shape = f"{row_format} {len(sequences)} x {tokens // len(sequences)} tokens"
    return Case(
        kernel="attend.paged.write_ring_", shape=shape, make=maker("unproved"), num_bytes=num_bytes,
        twins={"portable": maker("portable")},
    )  # fmt: skip


def _places(sequences: list[tuple[int, int]], page_bytes: int) -> Places:
    """Sequences in the slots from 0 on, each with the pages that its tokens need, given out at random."""
    slot, position, first = [], [], []
    for own, (begin, count) in enumerate(sequences):
        first += [len(slot)] * count
        slot += [own] * count
        position += range(begin, begin + count)
    width, num_pages = _pages(sequences, page_bytes)
    pages = torch.randperm(num_pages)
    table = torch.cat([pages] * (len(sequences) * width // len(pages) + 1))[: len(sequences) * width]
    table = table.int().view(len(sequences), width).to(best())
    slots, positions, firsts = (torch.tensor(x, dtype=torch.int32, device=best()) for x in (slot, position, first))
    return Places(slots, positions, firsts, table, {})


def _pages(sequences: list[tuple[int, int]], page_bytes: int) -> tuple[int, int]:
    """Pages of a sequence, and how many there are: at least one sequence's, and no more than fit in the pool."""
    width = -(-max(begin + count for begin, count in sequences) // PAGE_TOKENS)
    return width, max(width, min(len(sequences) * width, POOL_BYTES // page_bytes))


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, device=best())


def _stored(row_format: RowFormat, *shape: int) -> torch.Tensor:
    """Rows of random numbers, [*shape, bytes], a few of them again and again."""
    rows = pack(_random(1024, CHANNELS), row_format=row_format, rotary_dims=ROTARY)
    return rows[torch.randint(len(rows), shape, device=rows.device)]
