"""Rows through torch's own 8-bit dtypes; E2M1 by its midpoints."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dsv4.ops.rows.formats import INDEX_GROUP, ROW_GROUP, RowFormat, row_bytes

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Sizes from which the next code is nearer; a tie goes to the even code, so every other midpoint still rounds down.
E2M1_FROM = (0.25 + 2**-25, 0.75, 1.25 + 2**-23, 1.75, 2.5 + 2**-22, 3.5, 5.0 + 2**-21)


def pack(x: torch.Tensor, row_format: RowFormat, rotary_dims: int) -> torch.Tensor:
    """See ``dsv4.ops.rows.pack``."""
    if row_format != "packed":
        return _plain_bytes(x, row_format)
    plain, rotary = x.float().tensor_split([x.shape[-1] - rotary_dims], dim=-1)
    scaled, scales = _scaled(plain, ROW_GROUP, 1e-4, 0.875, 9)  # 448 = 0.875 x 2^9
    codes = scaled.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    padding = row_bytes(row_format, x.shape[-1], rotary_dims) - x.shape[-1] - rotary_dims - scales.shape[-1]
    return torch.cat([codes, _plain_bytes(rotary, "bfloat16"), F.pad(scales, (0, padding))], dim=-1)


def unpack(rows: torch.Tensor, row_format: RowFormat, channels: int, rotary_dims: int) -> torch.Tensor:
    """See ``dsv4.ops.rows.unpack``; float32."""
    if row_format != "packed":
        return _plain_values(rows, row_format)
    plain = channels - rotary_dims
    num_scales = -(-plain // ROW_GROUP)
    codes, rotary, scales = rows.split([plain, 2 * rotary_dims, rows.shape[-1] - plain - 2 * rotary_dims], dim=-1)
    values = codes.clone(memory_format=torch.contiguous_format).view(torch.float8_e4m3fn).float()
    values *= _spread(_powers(scales[..., :num_scales]), ROW_GROUP, plain)
    return torch.cat([values, _plain_values(rotary, "bfloat16")], dim=-1) if rotary_dims else values


def pack_index(x: torch.Tensor, row_format: RowFormat) -> torch.Tensor:
    """See ``dsv4.ops.rows.pack_index``."""
    if row_format != "packed":
        return _plain_bytes(x, row_format)
    x = x.float().contiguous()
    scaled, scales = _scaled(x, INDEX_GROUP, 6 * 2.0**-126, 0.75, 3)  # 6 = 0.75 x 2^3
    edges = torch.tensor(E2M1_FROM, device=x.device)
    codes = torch.bucketize(scaled.abs().nan_to_num(), edges, right=True, out_int32=True) + 8 * scaled.signbit()
    codes = F.pad(codes, (0, x.shape[-1] % 2)).to(torch.uint8)
    nibbles = codes[..., 0::2] | codes[..., 1::2] << 4
    return torch.cat([nibbles, scales.masked_fill(_grouped(x, INDEX_GROUP).isnan().any(dim=-1), 255)], dim=-1)


def unpack_index(rows: torch.Tensor, row_format: RowFormat, channels: int) -> torch.Tensor:
    """See ``dsv4.ops.rows.unpack_index``; float32."""
    if row_format != "packed":
        return _plain_values(rows, row_format)
    nibbles, scales = rows.tensor_split([-(-channels // 2)], dim=-1)
    codes = torch.stack([nibbles & 15, nibbles >> 4], dim=-1).flatten(-2)[..., :channels]  # [..., J]
    table = torch.tensor([*E2M1, *(-value for value in E2M1)], device=rows.device)
    return table[codes.int()] * _spread(_powers(scales), INDEX_GROUP, channels)


def _scaled(
    x: torch.Tensor, group: int, least: float, mantissa: float, exponent: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x over its groups' scales and the scales as E8M0; mantissa x 2^exponent is the largest code's value.

    frexp reads both off the bits, so that exact powers of two do not hang on a rounded logarithm.
    """
    most = _grouped(x, group).abs().nan_to_num().amax(dim=-1).clamp(min=least)
    own_mantissa, own_exponent = most.frexp()
    codes = own_exponent - exponent + (own_mantissa > mantissa) + 127  # [..., groups]
    inverse = ((254 - codes) << 23).int().view(torch.float32)
    return x * _spread(inverse, group, x.shape[-1]), codes.to(torch.uint8)


def _grouped(x: torch.Tensor, group: int) -> torch.Tensor:
    """[..., n] as [..., groups, group], the last one filled up with zeros."""
    return F.pad(x, (0, -x.shape[-1] % group)).unflatten(-1, (-1, group))


def _spread(scales: torch.Tensor, group: int, channels: int) -> torch.Tensor:
    """[..., groups] to the channels they scale."""
    return scales.repeat_interleave(group, dim=-1)[..., :channels]


def _powers(scales: torch.Tensor) -> torch.Tensor:
    """E8M0 codes as float32."""
    return scales.clone(memory_format=torch.contiguous_format).view(torch.float8_e8m0fnu).float()


def _plain_bytes(x: torch.Tensor, row_format: RowFormat) -> torch.Tensor:
    return x.to(getattr(torch, row_format)).contiguous().view(torch.uint8)


def _plain_values(rows: torch.Tensor, row_format: RowFormat) -> torch.Tensor:
    return rows.clone(memory_format=torch.contiguous_format).view(getattr(torch, row_format)).float()
