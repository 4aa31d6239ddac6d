"""Attention of an engine step: several sequences in one flat list, caches in rings and pages (report 3.6).

The same numbers as ``dsv4.ops.attend``, whose window and entries come from three places: raw tokens of the step
itself, older ones from the ring of the sequence's slot, entries from its pages:

    token p of slot s:    ring[s, p % L]
    entry e of slot s:    pages[table[s, e // n], e % n],    n = 128 / ratio entries a page

All are taken as the cache stores them: the step's own tokens are rounded to the row format first, so that a result
does not depend on where a step begins.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch

from dsv4.ops.attend import Entries, attend, paged_native
from dsv4.ops.backend import Backend, pick, triton_kernel
from dsv4.ops.places import PAGE_TOKENS, Places
from dsv4.ops.rows import RowFormat, check_format, row_bytes
from dsv4.ops.rows import portable as portable_rows
from dsv4.ops.rows import reference as reference_rows


def attend_paged(
    q: torch.Tensor,
    kv: torch.Tensor,
    sink: torch.Tensor,
    ring: torch.Tensor,
    places: Places,
    *,
    pages: torch.Tensor | None,
    picked: torch.Tensor | None,
    window: int,
    ratio: int,
    row_format: RowFormat,
    rotary_dims: int,
    scale: float,
    backend: Backend = "portable",
) -> torch.Tensor:
    """Return the attention output, [T, H, K] in the dtype of q.

    q: [T, H, K]; kv: [T, K], the step's own rows; sink: [H] float32; ring: [slots, L, bytes] uint8, L >= window, of
    which the tokens before this step are read; pages: [pages, n, bytes] uint8, or None for ratio 0, a window alone;
    picked: [T, P] int32, distinct entries in ascending order, then -1; without it a token sees all its
    (position + 1) // ratio entries.
    """
    _check_rows(kv, ring, places, row_format, rotary_dims)
    _check_attend(q, kv, sink, ring, pages, picked, window, ratio)
    given = (q, kv, sink, ring, places, pages, picked, window, ratio, row_format, rotary_dims, scale)
    if backend == "native" and paged_native.serves(q, kv):
        return paged_native.attend_paged(*given)
    if (kernel := triton_kernel(backend, "attend.paged_triton:attend_paged")) is not None:
        return kernel(*given)
    return _by_sequence(*given, backend)


def write_ring_(
    kv: torch.Tensor,
    ring: torch.Tensor,
    places: Places,
    *,
    row_format: RowFormat,
    rotary_dims: int,
    backend: Backend = "portable",
) -> None:
    """Store the step's rows, kv [T, K], in the rings of their slots: the last L of each sequence. Overwrites ring."""
    _check_rows(kv, ring, places, row_format, rotary_dims)
    if backend == "native" and paged_native.serves(kv, kv):
        paged_native.write_ring_(kv, ring, places, row_format, rotary_dims)
        return
    if (kernel := triton_kernel(backend, "attend.paged_triton:write_ring_")) is not None:
        kernel(kv, ring, places, row_format, rotary_dims)
        return
    pack = pick(backend, reference=reference_rows.pack, portable=portable_rows.pack)
    for own in _sequences(places):
        last = slice(max(own.step.start, own.step.stop - ring.shape[1]), own.step.stop)
        at = places.position[last].long() % ring.shape[1]
        ring[own.slot, at] = pack(kv[last], row_format, rotary_dims)


def _by_sequence(
    q: torch.Tensor,
    kv: torch.Tensor,
    sink: torch.Tensor,
    ring: torch.Tensor,
    places: Places,
    pages: torch.Tensor | None,
    picked: torch.Tensor | None,
    window: int,
    ratio: int,
    row_format: RowFormat,
    rotary_dims: int,
    scale: float,
    backend: Backend,
) -> torch.Tensor:
    """Gather each sequence's rows and attend to them as to contiguous ones."""
    pack = pick(backend, reference=reference_rows.pack, portable=portable_rows.pack)
    unpack = pick(backend, reference=reference_rows.unpack, portable=portable_rows.unpack)
    channels, out = kv.shape[1], torch.empty_like(q)

    def values(stored: torch.Tensor) -> torch.Tensor:
        return unpack(stored, row_format, channels, rotary_dims).to(q.dtype)

    stored = pack(kv, row_format, rotary_dims)  # [T, bytes]
    for own in _sequences(places):
        older = torch.arange(max(0, own.begin - window + 1), own.begin, device=ring.device) % ring.shape[1]
        raw = values(torch.cat([ring[own.slot, older], stored[own.step]]))
        entries = None
        if pages is not None:
            end = (places.position[own.step].long() + 1) // ratio  # [t]
            entry = torch.arange(int(end[-1]), device=pages.device)
            page = places.table[own.slot, entry // pages.shape[1]].long()
            own_entries = values(pages[page, entry % pages.shape[1]])[None]
            if picked is None:
                entries = Entries(own_entries, begin=torch.zeros_like(end)[None], end=end[None])
            else:
                entries = Entries(own_entries, picked=picked[own.step].long()[None])
        begin = torch.zeros(1, own.step.stop - own.step.start, dtype=torch.int64, device=q.device)
        now = q[own.step][None]
        result, _ = attend(now, raw[None], sink, begin, entries, window=window, scale=scale, backend=backend)
        out[own.step] = result[0]
    return out


class _Own(NamedTuple):
    """One sequence of a step: its flat tokens, its slot, the position of the first of them."""

    step: slice
    slot: int
    begin: int


def _sequences(places: Places) -> Iterator[_Own]:
    starts = places.first.unique().tolist()
    for start, stop in pairwise([*starts, len(places.first)]):
        yield _Own(slice(start, stop), int(places.slot[start]), int(places.position[start]))


def _check_rows(kv: torch.Tensor, ring: torch.Tensor, places: Places, row_format: RowFormat, rotary_dims: int) -> None:
    _check("kv", kv, kv.shape[:1] + kv.shape[-1:], kv.dtype)
    check_format(row_format, kv.shape[1], rotary_dims)
    row = row_bytes(row_format, kv.shape[1], rotary_dims)
    _check("ring", ring, (*places.table.shape[:1], *ring.shape[1:2], row), torch.uint8)
    for name in ("slot", "position", "first"):
        _check(f"places.{name}", getattr(places, name), kv.shape[:1], torch.int32)
    _check("places.table", places.table, places.table.shape[:2], torch.int32)


def _check_attend(
    q: torch.Tensor,
    kv: torch.Tensor,
    sink: torch.Tensor,
    ring: torch.Tensor,
    pages: torch.Tensor | None,
    picked: torch.Tensor | None,
    window: int,
    ratio: int,
) -> None:
    _check("q", q, (kv.shape[0], *q.shape[1:2], kv.shape[1]), kv.dtype)
    _check("sink", sink, q.shape[1:2], sink.dtype)
    if not 1 <= window <= ring.shape[1]:
        raise ValueError(f"window is {window}; expected 1 to {ring.shape[1]}, the tokens of a ring")
    if ratio not in (0, 4, PAGE_TOKENS):
        raise ValueError(f"ratio is {ratio}; expected 0, 4 or {PAGE_TOKENS}")
    if (ratio == 0) != (pages is None):
        raise ValueError(f"pages are {'missing' if pages is None else 'given'}; expected them unless ratio is 0")
    if pages is not None:
        _check("pages", pages, (*pages.shape[:1], PAGE_TOKENS // ratio, ring.shape[2]), torch.uint8)
    if picked is not None:
        if pages is None:
            raise ValueError("picked is given without pages; expected None")
        _check("picked", picked, (q.shape[0], *picked.shape[1:2]), torch.int32)


def _check(name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raise unless this is so. Once a layer and token when decoding, hence without the letters of ``Shapes``."""
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}; expected {list(shape)}")
    if tensor.dtype != dtype:
        raise ValueError(f"{name} has dtype {tensor.dtype}; expected {dtype}")
    if dtype in (torch.uint8, torch.int32) and not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()}; expected a contiguous tensor")
