"""Names, groups and sizes of row formats."""

from __future__ import annotations

from typing import Literal

import torch

RowFormat = Literal["float32", "bfloat16", "packed"]

ROW_GROUP = 64  # channels of a row that share a scale
INDEX_GROUP = 32  # channels of an indexer key that share one
UNIT = 4  # bytes of codes of a key that lie side by side in a page


def row_bytes(row_format: RowFormat, channels: int, rotary_dims: int) -> int:
    """Return the bytes of one row."""
    if row_format != "packed":
        return _plain_bytes(row_format, channels)
    scales = -(-(channels - rotary_dims) // ROW_GROUP)
    return channels + rotary_dims + -(-scales // 8) * 8


def index_row_bytes(row_format: RowFormat, channels: int) -> int:
    """Return the bytes of one indexer key."""
    if row_format != "packed":
        return _plain_bytes(row_format, channels)
    return -(-channels // 2) + -(-channels // INDEX_GROUP)


def index_places(row_format: RowFormat, channels: int, entries: int) -> torch.Tensor:
    """Return where the bytes of the keys of a page lie in it: [entries, index_row_bytes] int64.

    A page of packed keys of whole groups is stored in columns, so that a vector register takes one unit of many keys at
    once: units of 4 bytes of codes, [J / 8, entries], then scales, [J / 32, entries]. Others are rows.
    """
    row = index_row_bytes(row_format, channels)
    if row_format != "packed" or channels % INDEX_GROUP:
        return torch.arange(entries * row).view(entries, row)
    codes = channels // 2
    units = torch.arange(entries * codes).view(-1, entries, UNIT).transpose(0, 1).flatten(1)
    scales = torch.arange(entries * codes, entries * row).view(-1, entries).T
    return torch.cat([units, scales], dim=1)


def _plain_bytes(row_format: RowFormat, channels: int) -> int:
    return channels * (4 if row_format == "float32" else 2)
