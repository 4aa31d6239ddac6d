"""Names, groups and sizes of row formats."""

from __future__ import annotations

from typing import Literal

import torch

RowFormat = Literal["float32", "bfloat16", "packed", "packed-fp8"]

ROW_GROUP = 64  # channels of a row that share a scale
INDEX_GROUP = 32  # channels of an indexer key that share one
UNIT = 4  # bytes of codes of a key that lie side by side in a page
UNIT_ORDER = [0, 2, 1, 3]  # places of four FP8 codes in one


def is_packed(row_format: str) -> bool:
    """Say whether rows are E4M3 codes, and keys codes of one kind or the other."""
    return row_format in ("packed", "packed-fp8")


def row_bytes(row_format: RowFormat, channels: int, rotary_dims: int) -> int:
    """Return the bytes of one row."""
    if not is_packed(row_format):
        return _plain_bytes(row_format, channels)
    scales = -(-(channels - rotary_dims) // ROW_GROUP)
    return channels + rotary_dims + -(-scales // 8) * 8


def index_row_bytes(row_format: RowFormat, channels: int) -> int:
    """Return the bytes of one indexer key."""
    if not is_packed(row_format):
        return _plain_bytes(row_format, channels)
    return index_code_bytes(row_format, channels) + -(-channels // INDEX_GROUP)


def index_code_bytes(row_format: RowFormat, channels: int) -> int:
    """Return the bytes of the codes of one packed key."""
    return channels if row_format == "packed-fp8" else -(-channels // 2)


def index_places(row_format: RowFormat, channels: int, entries: int) -> torch.Tensor:
    """Return where the bytes of the keys of a page lie in it: [entries, index_row_bytes] int64.

    A page of packed keys of whole groups is stored in columns: units of 4 bytes of codes, [J / 8, entries] of FP4 or
    [J / 4, entries] of FP8, then scales, [J / 32, entries]. So a vector register on the CPU takes one unit of many keys
    at once, and a thread on a GPU the units of four keys in one load; a row of 68 or 132 bytes would begin at no
    multiple of 16. Four FP8 codes lie in the order 0, 2, 1, 3: two neighbours are then under one mask in the two halves
    of a word, as a GPU multiplies bfloat16. Other pages are rows.
    """
    row = index_row_bytes(row_format, channels)
    if not is_packed(row_format) or channels % INDEX_GROUP:
        return torch.arange(entries * row).view(entries, row)
    codes = index_code_bytes(row_format, channels)
    units = torch.arange(entries * codes).view(-1, entries, UNIT).transpose(0, 1)
    if row_format == "packed-fp8":
        units = units[:, :, UNIT_ORDER]
    scales = torch.arange(entries * codes, entries * row).view(-1, entries).T
    return torch.cat([units.flatten(1), scales], dim=1)


def _plain_bytes(row_format: RowFormat, channels: int) -> int:
    return channels * (4 if row_format == "float32" else 2)
