"""Paged attention on the CPU as one C kernel (``native/attend.c``)."""

from __future__ import annotations

import torch

from dsv4 import native
from dsv4.ops.places import Places
from dsv4.ops.rows.formats import RowFormat
from dsv4.ops.rows.native import FORMATS


def serves(q: torch.Tensor, kv: torch.Tensor) -> bool:
    """Say whether the kernel takes these: on the CPU, both float32 or both bfloat16."""
    return native.serves(q) and kv.dtype == q.dtype


def attend_paged(
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
) -> torch.Tensor:
    """See ``dsv4.ops.attend.paged.attend_paged``."""
    q, kv = q.contiguous(), kv.contiguous()
    out = torch.empty_like(q)
    num_picks = -1 if picked is None else picked.shape[1]
    sizes = (*q.shape, rotary_dims, ring.shape[1], window, ratio, num_picks, places.table.shape[1])
    how = (native.is_bfloat16(q), FORMATS[row_format], torch.get_num_threads(), float(scale))
    place = (places.slot, places.position, places.first, places.table)
    native.call("dsv4_attend_paged", *sizes, *how, q, kv, sink.float().contiguous(), ring, *place, pages, picked, out)
    return out


def write_ring_(kv: torch.Tensor, ring: torch.Tensor, places: Places, row_format: RowFormat, rotary_dims: int) -> None:
    """See ``dsv4.ops.attend.paged.write_ring_``."""
    sizes = (*kv.shape, rotary_dims, ring.shape[1], native.is_bfloat16(kv), FORMATS[row_format])
    native.call("dsv4_write_ring", *sizes, kv.contiguous(), places.slot, places.position, places.first, ring)
