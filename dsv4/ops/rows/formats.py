"""Names, groups and sizes of row formats."""

from __future__ import annotations

from typing import Literal

RowFormat = Literal["float32", "bfloat16", "packed"]

ROW_GROUP = 64  # channels of a row that share a scale
INDEX_GROUP = 32  # channels of an indexer key that share one


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


def _plain_bytes(row_format: RowFormat, channels: int) -> int:
    return channels * (4 if row_format == "float32" else 2)
