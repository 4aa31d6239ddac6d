"""Rows through torch's own dtypes."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dsv4.ops.lowbit.portable import decode, encode, join_nibbles, split_nibbles
from dsv4.ops.lowbit.tables import E2M1, E4M3, E4M3_KEY
from dsv4.ops.rows.formats import INDEX_GROUP, ROW_GROUP, RowFormat, index_code_bytes, is_packed, row_bytes


def pack(x: torch.Tensor, row_format: RowFormat, rotary_dims: int) -> torch.Tensor:
    """See ``dsv4.ops.rows.pack``."""
    if not is_packed(row_format):
        return _plain_bytes(x, row_format)
    plain, rotary = x.float().tensor_split([x.shape[-1] - rotary_dims], dim=-1)
    codes, scales = encode(plain, ROW_GROUP, E4M3)
    padding = row_bytes(row_format, x.shape[-1], rotary_dims) - x.shape[-1] - rotary_dims - scales.shape[-1]
    return torch.cat([codes, _plain_bytes(rotary, "bfloat16"), F.pad(scales, (0, padding))], dim=-1)


def unpack(rows: torch.Tensor, row_format: RowFormat, channels: int, rotary_dims: int) -> torch.Tensor:
    """See ``dsv4.ops.rows.unpack``; float32."""
    if not is_packed(row_format):
        return _plain_values(rows, row_format)
    plain = channels - rotary_dims
    num_scales = -(-plain // ROW_GROUP)
    codes, rotary, scales = rows.split([plain, 2 * rotary_dims, rows.shape[-1] - plain - 2 * rotary_dims], dim=-1)
    values = decode(codes, scales[..., :num_scales], ROW_GROUP, E4M3)
    return torch.cat([values, _plain_values(rotary, "bfloat16")], dim=-1) if rotary_dims else values


def pack_index(x: torch.Tensor, row_format: RowFormat) -> torch.Tensor:
    """See ``dsv4.ops.rows.pack_index``."""
    if not is_packed(row_format):
        return _plain_bytes(x, row_format)
    is_fp8 = row_format == "packed-fp8"
    codes, scales = encode(x, INDEX_GROUP, E4M3_KEY if is_fp8 else E2M1)
    return torch.cat([codes if is_fp8 else join_nibbles(codes), scales], dim=-1)


def unpack_index(rows: torch.Tensor, row_format: RowFormat, channels: int) -> torch.Tensor:
    """See ``dsv4.ops.rows.unpack_index``; float32."""
    if not is_packed(row_format):
        return _plain_values(rows, row_format)
    codes, scales = rows.tensor_split([index_code_bytes(row_format, channels)], dim=-1)
    if row_format == "packed-fp8":
        return decode(codes.contiguous(), scales, INDEX_GROUP, E4M3_KEY)
    return decode(split_nibbles(codes, channels), scales, INDEX_GROUP, E2M1)


def _plain_bytes(x: torch.Tensor, row_format: RowFormat) -> torch.Tensor:
    return x.to(getattr(torch, row_format)).contiguous().view(torch.uint8)


def _plain_values(rows: torch.Tensor, row_format: RowFormat) -> torch.Tensor:
    return rows.clone(memory_format=torch.contiguous_format).view(getattr(torch, row_format)).float()
