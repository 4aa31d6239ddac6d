"""The specification of rows: one value at a time, by tables of what each code stands for."""

from __future__ import annotations

import math
import struct
from bisect import bisect_left
from collections.abc import Callable

import torch

from dsv4.ops.rows.formats import INDEX_GROUP, ROW_GROUP, RowFormat, index_row_bytes, row_bytes

# By code, the sign bit aside. The E4M3 code after the last, 127, is NaN.
E4M3 = [code * 2.0**-9 for code in range(8)] + [(8 + code % 8) * 2.0 ** (code // 8 - 10) for code in range(8, 127)]
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
NAN_SCALE = 255


def pack(x: torch.Tensor, row_format: RowFormat, rotary_dims: int) -> torch.Tensor:
    """See ``dsv4.ops.rows.pack``."""
    num_bytes, plain = row_bytes(row_format, x.shape[-1], rotary_dims), x.shape[-1] - rotary_dims

    def packed(row: list[float]) -> bytes:
        codes, scales = _encode(row[:plain], E4M3, ROW_GROUP, least=1e-4)
        signed = [code | 128 * _is_negative(value) for code, value in zip(codes, row, strict=False)]
        written = bytes(signed) + _plain_bytes(row[plain:], "bfloat16") + bytes(scales)
        return written.ljust(num_bytes, b"\0")

    return _each_row(x, num_bytes, packed if row_format == "packed" else lambda row: _plain_bytes(row, row_format))


def unpack(rows: torch.Tensor, row_format: RowFormat, channels: int, rotary_dims: int) -> torch.Tensor:
    """See ``dsv4.ops.rows.unpack``; float32."""
    plain, table = channels - rotary_dims, [*E4M3, math.nan]

    def unpacked(row: bytes) -> list[float]:
        rotary, scales = row[plain : plain + 2 * rotary_dims], row[plain + 2 * rotary_dims :]
        values = [_signed(table[code % 128], code >= 128) for code in row[:plain]]
        scaled = [value * _power(scales[i // ROW_GROUP]) for i, value in enumerate(values)]
        return scaled + _plain_values(rotary, "bfloat16")

    return _each_value(
        rows, channels, unpacked if row_format == "packed" else lambda row: _plain_values(row, row_format)
    )


def pack_index(x: torch.Tensor, row_format: RowFormat) -> torch.Tensor:
    """See ``dsv4.ops.rows.pack_index``."""

    def packed(row: list[float]) -> bytes:
        codes, scales = _encode(row, E2M1, INDEX_GROUP, least=6 * 2.0**-126)
        signed = [code % 8 | 8 * _is_negative(value) for code, value in zip(codes, row, strict=True)]
        signed += [0] * (len(row) % 2)
        for i, value in enumerate(row):
            if math.isnan(value):
                scales[i // INDEX_GROUP] = NAN_SCALE
        return bytes(low | high << 4 for low, high in zip(signed[0::2], signed[1::2], strict=True)) + bytes(scales)

    num_bytes = index_row_bytes(row_format, x.shape[-1])
    return _each_row(x, num_bytes, packed if row_format == "packed" else lambda row: _plain_bytes(row, row_format))


def unpack_index(rows: torch.Tensor, row_format: RowFormat, channels: int) -> torch.Tensor:
    """See ``dsv4.ops.rows.unpack_index``; float32."""
    num_bytes = -(-channels // 2)

    def unpacked(row: bytes) -> list[float]:
        codes = [code for byte in row[:num_bytes] for code in (byte % 16, byte // 16)][:channels]
        scales = [_power(row[num_bytes + i // INDEX_GROUP]) for i in range(channels)]
        return [_signed(E2M1[code % 8], code >= 8) * scale for code, scale in zip(codes, scales, strict=True)]

    return _each_value(
        rows, channels, unpacked if row_format == "packed" else lambda row: _plain_values(row, row_format)
    )


def _encode(row: list[float], table: list[float], group: int, least: float) -> tuple[list[int], list[int]]:
    """Return the codes of a row, signs aside, and the E8M0 scales of its groups."""
    codes, scales = [], []
    for first in range(0, len(row), group):
        values = row[first : first + group]
        most = max([least, *(abs(value) for value in values if not math.isnan(value))])
        most = min(most, 2.0**128 - 2.0**104)  # an infinite value is cut off like the largest
        exponent = math.ceil(math.log2(most / table[-1]))
        codes += [_nearest(abs(value) / 2.0**exponent, table) for value in values]
        scales.append(exponent + 127)
    return codes, scales


def _nearest(size: float, table: list[float]) -> int:
    """The code of the nearest value, the even one of two; that after the last of the table for NaN."""
    if math.isnan(size):
        return len(table)
    size = min(size, table[-1])
    above = bisect_left(table, size)
    return min(max(above - 1, 0), above, key=lambda code: (abs(table[code] - size), code % 2))


def _is_negative(value: float) -> bool:
    return math.copysign(1.0, value) < 0


def _signed(size: float, is_negative: bool) -> float:
    return -size if is_negative else size


def _power(code: int) -> float:
    return math.nan if code == NAN_SCALE else 2.0 ** (code - 127)


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
