"""Compression into pages in an engine's steps: a step of many sequences with a token each, and of one long prompt.

Flash and Pro have the same widths. The portable twin looks at its numbers on the host.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.gpu.case import BANDWIDTH, Case
from dsv4.device import best
from dsv4.ops.backend import Backend
from dsv4.ops.compress.paged import compress_paged_
from dsv4.ops.places import PAGE_TOKENS, arrange, places_of
from dsv4.ops.rows import index_row_bytes, row_bytes

ROTARY, SPARE = 64, 8
KINDS = {"hca": (128, 512, False, False), "csa": (4, 512, True, False), "indexer": (4, 128, True, True)}
STEPS = {
    "256 sequences that close a block": [(slot, 1023, 1, 0) for slot in range(256)],
    "4096 tokens": [(0, 0, 4096, 0)],
}


def cases() -> list[Case]:
    """Each kind of compressor and step, in packed rows."""
    return [_case(kind, step) for kind in KINDS for step in STEPS]


def _case(kind: str, step: str) -> Case:
    ratio, channels, overlap, is_index = KINDS[kind]
    parts = 2 if overlap else 1
    tokens = sum(count for _, _, count, _ in STEPS[step])
    entries = max(tokens // ratio, len(STEPS[step]))
    # Of a prompt all tokens are read once; of a step the two blocks of each entry, half of their channels.
    read = min(tokens * parts, entries * ratio * parts) if tokens == 4096 else entries * ratio * parts
    row = index_row_bytes("packed", channels) if is_index else row_bytes("packed", channels, ROTARY)

    def maker(backend: Backend) -> Callable[[], Callable[[], object]]:
        return lambda: _make(kind, step, backend)

    return Case(
        kernel=f"compress.paged {kind}",
        shape=f"flash and pro {step}",
        make=maker("unproved"),
        num_bytes=2 * 4 * read * channels + entries * row,
        twins={"portable": maker("portable")},
        mark=BANDWIDTH if tokens == 4096 else None,
    )


def _make(kind: str, step: str, backend: Backend) -> Callable[[], object]:
    device, sequences = best(), STEPS[step]
    ratio, channels, overlap, is_index = KINDS[kind]
    parts, slots = 2 if overlap else 1, len(sequences)
    shape, numbers = arrange(sequences, [ratio])
    pages_of_one = max(begin + count for _, begin, count, _ in sequences) // PAGE_TOKENS + 1
    table = torch.arange(slots * pages_of_one, dtype=torch.int32, device=device).view(slots, pages_of_one)
    places = places_of(shape, torch.tensor(numbers, dtype=torch.int32, device=device), table)
    row = index_row_bytes("packed", channels) if is_index else row_bytes("packed", channels, ROTARY)
    pages = torch.zeros(slots * pages_of_one, PAGE_TOKENS // ratio, row, dtype=torch.uint8, device=device)
    kv, gate = torch.randn(2, shape.num_tokens, parts * channels, device=device)
    tails = torch.randn(2, slots, parts * ratio + SPARE, parts * channels, device=device)
    angle = torch.randn(len(places.closing[ratio].token), ROTARY // 2, device=device)
    bias = torch.randn(ratio, parts * channels, device=device)
    weight = torch.ones(channels, dtype=torch.bfloat16, device=device)
    given = (kv, gate, bias, weight, angle.cos(), angle.sin(), tails[0], tails[1], pages, places)
    return lambda: compress_paged_(
        *given, overlap=overlap, eps=1e-6, row_format="packed", is_index=is_index, rounds=True, dtype=torch.bfloat16,
        backend=backend,
    )  # fmt: skip
