"""The indexer's choice in prompts and when decoding at a million tokens, and its scores in a training step."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.gpu.case import INDEX, Case
from dsv4.device import best
from dsv4.ops import index
from dsv4.ops.backend import Backend
from dsv4.ops.index.paged import PAGE_ENTRIES, RATIO, select_paged
from dsv4.ops.places import Places
from dsv4.ops.rows import RowFormat, index_row_bytes
from dsv4.ops.rows.formats import index_code_bytes

HEADS, CHANNELS = 64, 128
PICKS = {"flash": 512, "pro": 1024}
PROMPTS = (4096, 65536)
MILLION, BATCHES = 1 << 20, (1, 64)
FORMATS: tuple[RowFormat, ...] = ("bfloat16", "packed")
DECODED: tuple[RowFormat, ...] = (*FORMATS, "packed-fp8")  # when decoding, where keys are read once for each query
BYTES = 2  # of an element, bfloat16
BALANCE = 165  # operations a byte of an H200: 790 TFLOP/s of bfloat16 over 4.8 TB/s
OF_PRODUCTS = 2 * HEADS * CHANNELS  # operations of a query and an entry


def cases() -> list[Case]:
    """Prompts, contiguous and in pages, decoding in pages, and scores with their gradients."""
    found = []
    for model, picks in PICKS.items():
        for tokens in PROMPTS:
            found.append(_prompt(model, picks, tokens))
            found += [_step(model, picks, [tokens], tokens, row_format) for row_format in FORMATS]
            found.append(_scores(model, picks, tokens))
        for batch in BATCHES:
            found += [_step(model, picks, [MILLION] * batch, 1, row_format) for row_format in DECODED]
    return found


def _prompt(model: str, picks: int, tokens: int) -> Case:
    def make(backend: Backend) -> Callable[[], object]:
        q, weights = _queries(tokens)
        k = torch.randn(1, tokens // RATIO, CHANNELS, dtype=torch.bfloat16, device=best())
        end = (torch.arange(tokens, device=best())[None] + 1) // RATIO
        begin = torch.zeros_like(end)
        return lambda: index.select(q[None], k, weights[None], begin, end, picks, backend=backend)

    read = tokens * (HEADS * CHANNELS * BYTES + HEADS * 4 + 16) + tokens // RATIO * CHANNELS * BYTES
    flops = OF_PRODUCTS * _scored(tokens, tokens, picks)
    return _case("index.select", f"{model} {tokens} tokens", make, read + tokens * picks * 8, flops, has_twin=True)


def _step(model: str, picks: int, lengths: list[int], own: int, row_format: RowFormat) -> Case:
    """One engine step: of each sequence its last ``own`` tokens; all have the same length."""
    batch, length = len(lengths), lengths[0]

    def make(backend: Backend) -> Callable[[], object]:
        q, weights = _queries(batch * own)
        table = torch.randperm(batch * length // (RATIO * PAGE_ENTRIES), device=best(), dtype=torch.int32)
        pages = _pages(len(table), row_format)
        slot = torch.arange(batch, device=best(), dtype=torch.int32).repeat_interleave(own)
        position = torch.arange(length - own, length, device=best(), dtype=torch.int32).repeat(batch)
        places = Places(slot, position, slot * own, table.view(batch, -1), {})
        return lambda: select_paged(q, weights, pages, places, picks, row_format=row_format, backend=backend)

    keys = batch * length // RATIO * index_row_bytes(row_format, CHANNELS)
    num_bytes = keys + batch * own * (HEADS * CHANNELS * BYTES + HEADS * 4 + picks * 4)
    name = f"{model} {own} tokens" if own == length else f"{model} {batch} x 1 token at {length}"
    flops = OF_PRODUCTS * batch * _scored(own, length, picks)
    # Twins gather each sequence's keys: at a million tokens one sequence says enough.
    return _case("index.select_paged", f"{name}, {row_format}", make, num_bytes, flops, has_twin=batch == 1)


def _scores(model: str, picks: int, tokens: int) -> Case:
    entries = tokens // RATIO

    def make(backend: Backend) -> Callable[[], object]:
        q, weights = _queries(tokens)
        k = torch.randn(1, entries, CHANNELS, dtype=torch.bfloat16, device=best())
        q, k, weights = (x.requires_grad_() for x in (q[None], k, weights[None]))
        end = (torch.arange(tokens, device=best()) + 1)[:, None] // RATIO
        place = torch.arange(picks, device=best())
        spread = torch.where(end > picks, place * end // picks, torch.where(place < end, place, -1))[None]
        grad = torch.randn(1, tokens, picks, device=best())

        def run() -> object:
            return torch.autograd.grad(index.score(q, k, weights, spread, backend=backend), (q, k, weights), grad)

        return run

    picked = int(((torch.arange(tokens) + 1) // RATIO).clamp(max=picks).sum())
    of_q, of_k, of_picks = tokens * HEADS * CHANNELS * BYTES, entries * CHANNELS * BYTES, tokens * picks
    num_bytes = 3 * (of_q + of_k) + of_picks * (8 + 4 + 8 + 4)  # forward: indices, scores; backward: indices, gradients
    # Products again in backward, and two for gradients.
    return _case("index.score.backward", f"{model} {tokens} tokens", make, num_bytes, 4 * OF_PRODUCTS * picked, True)


def _case(
    kernel: str, shape: str, make: Callable[[Backend], Callable[[], object]], num_bytes: int, flops: int, has_twin: bool
) -> Case:
    return Case(
        kernel=kernel,
        shape=shape,
        make=lambda: make("unproved"),
        num_bytes=num_bytes,
        flops=flops,
        twins={"portable": lambda: make("portable")} if has_twin else {},
        mark=INDEX,
    )


def _queries(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    q = torch.randn(tokens, HEADS, CHANNELS, dtype=torch.bfloat16, device=best())
    return q, torch.randn(tokens, HEADS, device=best())


def _scored(own: int, length: int, picks: int) -> int:
    """Entries that the last ``own`` tokens choose among; where there are no more than picks, nobody needs a score."""
    entries = (torch.arange(length - own, length) + 1) // RATIO
    return int(entries[entries > picks].sum())


def _pages(count: int, row_format: RowFormat) -> torch.Tensor:
    """Random keys, [count, 32, bytes] uint8; packed ones with scales from 2^-7 to 1."""
    if row_format == "bfloat16":
        keys = torch.randn(count, PAGE_ENTRIES, CHANNELS, dtype=torch.bfloat16, device=best())
        return keys.view(torch.uint8)
    size = index_row_bytes(row_format, CHANNELS)
    pages = torch.randint(256, (count, PAGE_ENTRIES * size), dtype=torch.uint8, device=best())
    codes = PAGE_ENTRIES * index_code_bytes(row_format, CHANNELS)
    pages[:, codes:] = 120 + pages[:, codes:] % 8
    if row_format == "packed-fp8":
        pages[:, :codes] &= 0xF7  # no code is that of NaN
    return pages.view(count, PAGE_ENTRIES, size)
