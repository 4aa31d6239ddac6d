"""The kernels' own reading and writing of rows (``native/rows.h``), for whole tensors."""

from __future__ import annotations

import torch

from dsv4 import native
from dsv4.ops.rows import portable
from dsv4.ops.rows.formats import RowFormat, index_row_bytes, row_bytes

FORMATS = {"float32": 0, "bfloat16": 1, "packed": 2, "packed-fp8": 3}  # as native/rows.h numbers them


def pack(x: torch.Tensor, row_format: RowFormat, rotary_dims: int) -> torch.Tensor:
    """See ``dsv4.ops.rows.pack``."""
    if x.device.type != "cpu":
        return portable.pack(x, row_format, rotary_dims)
    return _pack(x, row_format, rotary_dims, 0, row_bytes(row_format, x.shape[-1], rotary_dims))


def pack_index(x: torch.Tensor, row_format: RowFormat) -> torch.Tensor:
    """See ``dsv4.ops.rows.pack_index``."""
    if x.device.type != "cpu":
        return portable.pack_index(x, row_format)
    return _pack(x, row_format, 0, 1, index_row_bytes(row_format, x.shape[-1]))


def unpack(rows: torch.Tensor, row_format: RowFormat, channels: int, rotary_dims: int) -> torch.Tensor:
    """See ``dsv4.ops.rows.unpack``; float32."""
    if rows.device.type != "cpu":
        return portable.unpack(rows, row_format, channels, rotary_dims)
    return _unpack(rows, row_format, channels, rotary_dims, 0)


def unpack_index(rows: torch.Tensor, row_format: RowFormat, channels: int) -> torch.Tensor:
    """See ``dsv4.ops.rows.unpack_index``; float32."""
    if rows.device.type != "cpu":
        return portable.unpack_index(rows, row_format, channels)
    return _unpack(rows, row_format, channels, 0, 1)


def _pack(x: torch.Tensor, row_format: RowFormat, rotary_dims: int, is_index: int, num_bytes: int) -> torch.Tensor:
    x = x.float().contiguous()
    rows = torch.empty(*x.shape[:-1], num_bytes, dtype=torch.uint8)
    num_rows = x.shape[:-1].numel()
    native.call("dsv4_pack", num_rows, x.shape[-1], rotary_dims, FORMATS[row_format], is_index, x, rows)
    return rows


def _unpack(rows: torch.Tensor, row_format: RowFormat, channels: int, rotary_dims: int, is_index: int) -> torch.Tensor:
    rows = rows.contiguous()
    x = torch.empty(*rows.shape[:-1], channels)
    num_rows = rows.shape[:-1].numel()
    native.call("dsv4_unpack", num_rows, channels, rotary_dims, FORMATS[row_format], is_index, rows, x)
    return x
