"""The specification of rows: one value at a time."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable

import torch

from dsv4.ops.lowbit.reference import decode, encode
from dsv4.ops.lowbit.tables import E2M1, E4M3, E4M3_KEY
from dsv4.ops.rows.formats import (
    INDEX_GROUP,
    ROW_GROUP,
    RowFormat,
    index_code_bytes,
    index_row_bytes,
    is_packed,
    row_bytes,
)


def pack(x: torch.Tensor, row_format: RowFormat, rotary_dims: int) -> torch.Tensor:
    """See ``dsv4.ops.rows.pack``."""
    num_bytes, plain = row_bytes(row_format, x.shape[-1], rotary_dims), x.shape[-1] - rotary_dims

    def packed(row: list[float]) -> bytes:
        codes, scales = encode(row[:plain], ROW_GROUP, E4M3)
        written = bytes(codes) + _plain_bytes(row[plain:], "bfloat16") + bytes(scales)
        return written.ljust(num_bytes, b"\0")

    return _each_row(x, num_bytes, packed if is_packed(row_format) else lambda row: _plain_bytes(row, row_format))


def unpack(rows: torch.Tensor, row_format: RowFormat, channels: int, rotary_dims: int) -> torch.Tensor:
    """See ``dsv4.ops.rows.unpack``; float32."""
    plain = channels - rotary_dims

    def unpacked(row: bytes) -> list[float]:
        rotary, scales = row[plain : plain + 2 * rotary_dims], row[plain + 2 * rotary_dims :]
        return decode(list(row[:plain]), list(scales), ROW_GROUP, E4M3) + _plain_values(rotary, "bfloat16")

    return _each_value(
        rows, channels, unpacked if is_packed(row_format) else lambda row: _plain_values(row, row_format)
    )


def pack_index(x: torch.Tensor, row_format: RowFormat) -> torch.Tensor:
    """See ``dsv4.ops.rows.pack_index``."""

    def packed(row: list[float]) -> bytes:
        if row_format == "packed-fp8":
            codes, scales = encode(row, INDEX_GROUP, E4M3_KEY)
            return bytes(codes) + bytes(scales)
        codes, scales = encode(row, INDEX_GROUP, E2M1)
        codes += [0] * (len(row) % 2)
        return bytes(low | high << 4 for low, high in zip(codes[0::2], codes[1::2], strict=True)) + bytes(scales)

    num_bytes = index_row_bytes(row_format, x.shape[-1])
    return _each_row(x, num_bytes, packed if is_packed(row_format) else lambda row: _plain_bytes(row, row_format))


def unpack_index(rows: torch.Tensor, row_format: RowFormat, channels: int) -> torch.Tensor:
    """See ``dsv4.ops.rows.unpack_index``; float32."""
    num_bytes = index_code_bytes(row_format, channels)

    def unpacked(row: bytes) -> list[float]:
        if row_format == "packed-fp8":
            return decode(list(row[:num_bytes]), list(row[num_bytes:]), INDEX_GROUP, E4M3_KEY)
        codes = [code for byte in row[:num_bytes] for code in (byte % 16, byte // 16)][:channels]
        return decode(codes, list(row[num_bytes:]), INDEX_GROUP, E2M1)

    return _each_value(
        rows, channels, unpacked if is_packed(row_format) else lambda row: _plain_values(row, row_format)
    )


def _plain_bytes(row: list[float], row_format: RowFormat) -> bytes:
    wide = [struct.unpack("<I", struct.pack("<f", value))[0] for value in row]
    if row_format == "float32":
        return struct.pack(f"<{len(row)}I", *wide)
    # To nearest: half of the lower 16 bits is added, less one where the upper part is even, so that ties stay even.
    narrow = [
        0x7FC0 if math.isnan(x) else (bits + 0x7FFF + (bits >> 16) % 2) >> 16 for x, bits in zip(row, wide, strict=True)
    ]
    return struct.pack(f"<{len(row)}H", *narrow)


def _plain_values(row: bytes, row_format: RowFormat) -> list[float]:
    if row_format == "float32":
        return list(struct.unpack(f"<{len(row) // 4}f", row))
    narrow = struct.unpack(f"<{len(row) // 2}H", row)
    return [struct.unpack("<f", struct.pack("<I", bits << 16))[0] for bits in narrow]


def _each_row(x: torch.Tensor, num_bytes: int, written: Callable[[list[float]], bytes]) -> torch.Tensor:
    rows = [list(written(row)) for row in x.float().reshape(-1, x.shape[-1]).tolist()]
    return torch.tensor(rows, dtype=torch.uint8, device=x.device).reshape(*x.shape[:-1], num_bytes)


def _each_value(rows: torch.Tensor, channels: int, read: Callable[[bytes], list[float]]) -> torch.Tensor:
    values = [read(bytes(row)) for row in rows.reshape(-1, rows.shape[-1]).tolist()]
    return torch.tensor(values, dtype=torch.float64, device=rows.device).float().reshape(*rows.shape[:-1], channels)
