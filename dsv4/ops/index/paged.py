"""The indexer's choice in an engine step: several sequences in one flat list, keys in pages (report 3.6).

The same choice as ``dsv4.ops.index.select``, token t seeing the first (position + 1) // 4 entries of its sequence:

    key e of slot s:    pages[table[s, e // 32], e % 32]

Keys are taken in the dtype of q, which changes none that was stored from it. Native, a score runs over the channels and
then the heads in their order, whatever else the step holds. The Triton kernels read nothing back to the CPU.
"""

from __future__ import annotations

from itertools import pairwise

import torch

from dsv4.ops.backend import Backend, triton_kernel
from dsv4.ops.index import paged_native, select
from dsv4.ops.places import PAGE_TOKENS, Places
from dsv4.ops.rows import RowFormat, index_row_bytes, read_index_pages, unpack_index
from dsv4.ops.shapes import Shapes

RATIO = 4  # tokens of an entry: only CSA layers have an indexer
PAGE_ENTRIES = PAGE_TOKENS // RATIO


def select_paged(
    q: torch.Tensor,
    weights: torch.Tensor,
    pages: torch.Tensor,
    places: Places,
    num_picks: int,
    *,
    row_format: RowFormat,
    backend: Backend = "portable",
) -> torch.Tensor:
    """Return the entries that tokens pick, [T, P] int32 ascending, -1 after the last one; P = num_picks.

    q: [T, I, J]; weights: [T, I], of any float dtype; pages: [pages, 32, bytes] uint8, keys of J channels.
    No gradient passes through the choice.
    """
    _check(q, weights, pages, places, num_picks, row_format)
    if backend == "native" and paged_native.serves(q, weights):
        return paged_native.select_paged(q, weights, pages, places, num_picks, row_format)
    kernel = triton_kernel(backend, "index.paged_triton:select_paged")
    with torch.no_grad():
        if kernel is not None:
            return kernel(q, weights, pages, places, num_picks, row_format)
        return _by_sequence(q, weights, pages, places, num_picks, row_format, backend)


def _by_sequence(
    q: torch.Tensor,
    weights: torch.Tensor,
    pages: torch.Tensor,
    places: Places,
    num_picks: int,
    row_format: RowFormat,
    backend: Backend,
) -> torch.Tensor:
    """Gather each sequence's keys and choose among them as among contiguous ones."""
    picked = torch.full((len(q), num_picks), -1, dtype=torch.int32, device=q.device)
    for start, stop in pairwise([*places.first.unique().tolist(), len(q)]):
        now = slice(start, stop)
        end = (places.position[now].long() + 1) // RATIO  # [t]
        num_entries = int(end[-1])
        own = places.table[places.slot[start], : -(-num_entries // PAGE_ENTRIES)].long()
        rows = read_index_pages(pages[own], row_format=row_format, channels=q.shape[-1]).flatten(0, 1)[:num_entries]
        k = unpack_index(rows, row_format=row_format, channels=q.shape[-1], dtype=q.dtype, backend=backend)  # [C, J]
        chosen = select(
            q[None, now], k[None], weights[None, now], torch.zeros_like(end)[None], end[None], num_picks,
            backend=backend,
        )  # fmt: skip
        picked[now, : chosen.shape[-1]] = chosen[0].int()
    return picked


def _check(
    q: torch.Tensor, weights: torch.Tensor, pages: torch.Tensor, places: Places, num_picks: int, row_format: RowFormat
) -> None:
    shapes = Shapes()
    shapes.check("q", q, "T I J")
    shapes.check("weights", weights, "T I")
    shapes.check("pages", pages, f"pages {PAGE_ENTRIES} {index_row_bytes(row_format, q.shape[-1])}")
    if pages.dtype != torch.uint8 or not pages.is_contiguous():
        raise ValueError(f"pages has dtype {pages.dtype} and strides {pages.stride()}; expected contiguous uint8")
    for name, letters in (("slot", "T"), ("position", "T"), ("first", "T"), ("table", "S n")):
        place = getattr(places, name)
        shapes.check(f"places.{name}", place, letters)
        if place.dtype != torch.int32 or not place.is_contiguous():
            raise ValueError(f"places.{name} has dtype {place.dtype}; expected contiguous int32")
    if num_picks < 1:
        raise ValueError(f"num_picks is {num_picks}; expected at least 1")
