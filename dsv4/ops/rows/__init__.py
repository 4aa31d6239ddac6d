"""Rows of the key-value cache as bytes (report 2.3.4).

``float32`` and ``bfloat16`` keep every channel alike. ``packed`` keeps what the released model's rounding leaves, so
nothing is lost on a row that was so rounded:

    a row of K channels, the last R rotary:   K - R E4M3 codes | R bfloat16 | E8M0 scales, zeros to 8 bytes
    an indexer key of J channels:             J E2M1 codes, the low nibble the even channel | E8M0 scales

``packed-fp8`` has the same rows, and keys of more bits, for models whose keys are not rounded to FP4 anyway:

    an indexer key of J channels:             J E4M3 codes | E8M0 scales

A group of 64 channels shares a scale in rows, of 32 in keys: the least power of two by which the largest of them fits
under 448 or 6, and at least 2^-22 in rows, that of 1e-4, and 2^-126 in keys. Rounding is to nearest, ties to even. In
rows a NaN has a code of its own; in keys it makes one of its whole group, by the scale, and no code needs looking at.

A value of E2M1 times a power of two is one of E4M3 times another, and the least scale is as small: an FP8 key holds any
FP4 key to the bit. So a model in released precision chooses the same entries with either, and another one keeps four
significant bits of each channel where FP4 leaves two.
"""

from __future__ import annotations

from typing import get_args

import torch

from dsv4.device import is_accelerator
from dsv4.ops.backend import Backend, pick
from dsv4.ops.rows import native, portable, reference
from dsv4.ops.rows.formats import RowFormat, index_places, index_row_bytes, is_packed, row_bytes
from dsv4.ops.shapes import check_floating

__all__ = [
    "RowFormat",
    "check_format",
    "index_row_bytes",
    "is_packed",
    "pack",
    "pack_index",
    "read_index_pages",
    "row_bytes",
    "unpack",
    "unpack_index",
    "write_index_pages_",
]


def pack(x: torch.Tensor, *, row_format: RowFormat, rotary_dims: int, backend: Backend = "portable") -> torch.Tensor:
    """Return rows as bytes: x [..., K] float, returns [..., row_bytes] uint8. A packed row takes no NaN."""
    _check_values(x, row_format)
    check_format(row_format, x.shape[-1], rotary_dims)
    chosen = pick(
        backend,
        reference=reference.pack,
        portable=portable.pack,
        native=native.pack,
        triton="rows.triton:pack",
    )
    return chosen(x, row_format, rotary_dims)


def unpack(
    rows: torch.Tensor,
    *,
    row_format: RowFormat,
    channels: int,
    rotary_dims: int,
    dtype: torch.dtype,
    backend: Backend = "portable",
) -> torch.Tensor:
    """Return the values of rows: [..., row_bytes] uint8, returns [..., K] rounded to ``dtype``."""
    check_format(row_format, channels, rotary_dims)
    _check_bytes(rows, row_bytes(row_format, channels, rotary_dims), row_format, channels)
    chosen = pick(
        backend,
        reference=reference.unpack,
        portable=portable.unpack,
        native=native.unpack,
        triton="rows.triton:unpack",
    )
    return chosen(rows, row_format, channels, rotary_dims).to(dtype)


def pack_index(x: torch.Tensor, *, row_format: RowFormat, backend: Backend = "portable") -> torch.Tensor:
    """Return indexer keys as bytes: x [..., J] float, returns [..., index_row_bytes] uint8. Packed takes no NaN."""
    _check_values(x, row_format)
    chosen = pick(
        backend,
        reference=reference.pack_index,
        portable=portable.pack_index,
        native=native.pack_index,
        triton="rows.triton:pack_index",
    )
    return chosen(x, row_format)


def unpack_index(
    rows: torch.Tensor,
    *,
    row_format: RowFormat,
    channels: int,
    dtype: torch.dtype,
    backend: Backend = "portable",
) -> torch.Tensor:
    """Return the values of indexer keys: [..., index_row_bytes] uint8, returns [..., J] rounded to ``dtype``."""
    _check_name(row_format)
    _check_bytes(rows, index_row_bytes(row_format, channels), row_format, channels)
    chosen = pick(
        backend,
        reference=reference.unpack_index,
        portable=portable.unpack_index,
        native=native.unpack_index,
        triton="rows.triton:unpack_index",
    )
    return chosen(rows, row_format, channels).to(dtype)


def check_format(row_format: str, channels: int, rotary_dims: int) -> None:
    """Raise ``ValueError`` unless rows of this format can have so many channels, the last ``rotary_dims`` rotary."""
    _check_name(row_format)
    if not 0 <= rotary_dims <= channels:
        raise ValueError(f"rotary_dims is {rotary_dims}; expected 0 to {channels}, the channels")


def _check_name(row_format: str) -> None:
    if row_format not in get_args(RowFormat):
        raise ValueError(f"row_format is {row_format!r}; expected one of {', '.join(get_args(RowFormat))}")


def _check_values(x: torch.Tensor, row_format: str) -> None:
    _check_name(row_format)
    check_floating("x", x)
    if x.dim() == 0:
        raise ValueError("x has shape []; expected [..., channels]")
    if is_packed(row_format) and not is_accelerator(x.device) and bool(x.isnan().any()):  # to look would wait for it
        raise ValueError(f"x holds {int(x.isnan().sum())} NaN; expected numbers in a packed row")


def read_index_pages(pages: torch.Tensor, *, row_format: RowFormat, channels: int) -> torch.Tensor:
    """Return the keys of pages as rows: [pages, entries, bytes] uint8, as they lie there, to the same shape."""
    places = index_places(row_format, channels, pages.shape[1]).to(pages.device)
    return pages.flatten(1)[:, places.flatten()].view(pages.shape)


def write_index_pages_(
    pages: torch.Tensor,
    page: torch.Tensor,
    entry: torch.Tensor,
    rows: torch.Tensor,
    *,
    row_format: RowFormat,
    channels: int,
) -> None:
    """Store keys in pages. page, entry: [n] int64; rows: [n, bytes] uint8; pages: [pages, entries, bytes]."""
    places = index_places(row_format, channels, pages.shape[1]).to(pages.device)
    pages.flatten(1)[page[:, None], places[entry]] = rows


def _check_bytes(rows: torch.Tensor, num_bytes: int, row_format: str, channels: int) -> None:
    if rows.dtype != torch.uint8:
        raise ValueError(f"rows has dtype {rows.dtype}; expected torch.uint8")
    if rows.dim() == 0 or rows.shape[-1] != num_bytes:
        wanted = f"[..., {num_bytes}], {channels} channels in {row_format}"
        raise ValueError(f"rows has shape {list(rows.shape)}; expected {wanted}")
