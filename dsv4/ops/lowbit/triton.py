"""Low precision in one pass each: what is read once is scaled, coded and, to be rounded, decoded in registers.

Codes are made by arithmetic of float32 and its bits, so that they hang on no device's own 8-bit casts; bfloat16
goes in and out as the upper half of those bits. A program takes neighbouring groups of rows, or one block of 128 x 128.
"""

# Kernels are a language of their own, in which a constexpr is a number and tensors are cut by None.

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dsv4.ops.hadamard.triton import butterflies
from dsv4.ops.lowbit import portable
from dsv4.ops.lowbit.packed import Packed
from dsv4.ops.lowbit.tables import BLOCK, FP4_GROUP
from dsv4.ops.lowbit.triton_codes import (
    bits_of,
    cast,
    cast_exact,
    code_of,
    factor_of,
    group_scales,
    most_of,
    nearest_code,
    nearest_value,
    number_of,
    raw_bits,
    scale_of,
    value_of,
)

ELEMENTS = 4096  # numbers of a program that takes groups: 32 registers of each of its 128 threads
WARPS = 4
BLOCK_WARPS = 8

_MOST = tl.constexpr(0x7F7FFFFF)  # the largest float32
_FLOOR = tl.constexpr(0x38D1B717)  # 1e-4, E4M3's floor, in float32


def quantise_rows(x: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``dsv4.ops.lowbit.quantise_rows``."""
    x = x.contiguous()
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    scales = torch.empty(*x.shape[:-1], -(-x.shape[-1] // group), dtype=torch.uint8, device=x.device)
    _over_groups(_encode_kernel, (x, codes, scales), x, group, is_fp4=False)
    return codes, scales


def quantise_fp4(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``dsv4.ops.lowbit.quantise_fp4``; codes and scales."""
    w = w.contiguous()
    *rows, columns = w.shape
    codes, scales = (
        torch.empty(*rows, columns // share, dtype=torch.uint8, device=w.device) for share in (2, FP4_GROUP)
    )
    _over_groups(_encode_kernel, (w, codes, scales), w, FP4_GROUP, is_fp4=True)
    return codes, scales


def quantise_blocks(w: torch.Tensor, scale_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``dsv4.ops.lowbit.quantise_blocks``; codes and scales."""
    w = w.contiguous()
    codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
    scales = torch.empty(_block_counts(w.shape), dtype=scale_dtype, device=w.device)
    _over_blocks(_encode_blocks_kernel, (w, codes, scales), w.shape, scales.numel())
    return codes, scales


def dequantise(packed: Packed, dtype: torch.dtype) -> torch.Tensor:
    """See ``dsv4.ops.lowbit.dequantise``."""
    codes, scales = packed.codes.contiguous(), packed.scales.contiguous()
    w = torch.empty(packed.shape, dtype=dtype, device=codes.device)
    if packed.kind == "fp8":
        _over_blocks(_decode_blocks_kernel, (codes, scales, w), w.shape, scales.numel())
    elif w.numel():
        groups = scales.numel()
        tile = ELEMENTS // FP4_GROUP
        _decode_fp4_kernel[(triton.cdiv(groups, tile),)](codes, scales, raw_bits(w), groups, tile, num_warps=WARPS)
    return w


def round_rows(x: torch.Tensor, group: int, channels: int) -> torch.Tensor:
    """See ``dsv4.ops.lowbit.round_rows``."""
    x = x.contiguous()
    y = torch.empty_like(x)
    _over_groups(_round_kernel, (x, y), x, group, channels, is_fp4=False)
    return y


def round_index(x: torch.Tensor) -> torch.Tensor:
    """See ``dsv4.ops.lowbit.round_index``."""
    if x.dtype == torch.float64:  # transformed in float64, which on an accelerator nothing but tests has
        return portable.round_index(x)
    x, width = x.contiguous(), x.shape[-1]
    y = torch.empty_like(x)
    if x.numel():
        rows, tile = x.numel() // width, max(1, ELEMENTS // width)
        _round_index_kernel[(triton.cdiv(rows, tile),)](
            raw_bits(x), raw_bits(y), rows, width**-0.5, tile, width, width.bit_length() - 1, min(width, FP4_GROUP),
            num_warps=WARPS,
        )  # fmt: skip
    return y


def round_fp4(w: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """See ``dsv4.ops.lowbit.round_fp4``."""
    w = w.contiguous()
    y = torch.empty(w.shape, dtype=dtype, device=w.device)
    _over_groups(_round_kernel, (w, y), w, FP4_GROUP, is_fp4=True)
    return y


def round_blocks(w: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """See ``dsv4.ops.lowbit.round_blocks``."""
    w = w.contiguous()
    y = torch.empty(w.shape, dtype=dtype, device=w.device)
    _over_blocks(_round_blocks_kernel, (w, y), w.shape, _block_counts(w.shape).numel())
    return y


# Launches


def _over_groups(kernel, tensors, x: torch.Tensor, group: int, channels: int | None = None, *, is_fp4: bool) -> None:
    """Run a kernel over the groups of the first ``channels`` of each row, and over the others in parts as wide."""
    width = x.shape[-1]
    channels = width if channels is None else channels
    if not x.numel():
        return
    group = min(group, width)
    coded = triton.cdiv(channels, group)
    per_row = coded + triton.cdiv(width - channels, group)
    padded = triton.next_power_of_2(group)
    parts, tile = x.numel() // width * per_row, max(1, ELEMENTS // padded)
    is_whole = group == padded and channels % group == 0 and width % group == 0
    kernel[(triton.cdiv(parts, tile),)](
        *map(raw_bits, tensors), parts, per_row, coded, width, channels, group, tile, padded, is_whole, is_fp4,
        num_warps=WARPS,
    )  # fmt: skip


def _over_blocks(kernel, tensors, shape: torch.Size, num_blocks: int) -> None:
    """Run a kernel over the blocks of 128 x 128 of a stack of matrices."""
    if num_blocks:
        rows, columns = shape[-2:]
        kernel[(num_blocks,)](
            *map(raw_bits, tensors), rows, columns, triton.cdiv(rows, BLOCK), triton.cdiv(columns, BLOCK), BLOCK,
            num_warps=BLOCK_WARPS,
        )  # fmt: skip


def _block_counts(shape: torch.Size) -> torch.Size:
    *stack, rows, columns = shape
    return torch.Size([*stack, -(-rows // BLOCK), -(-columns // BLOCK)])


# Groups of rows


@triton.jit
def _places(
    parts, per_row, coded, width, channels,
    GROUP: tl.constexpr, TILE: tl.constexpr, PADDED: tl.constexpr, IS_WHOLE: tl.constexpr,
):  # fmt: skip
    """Parts of this program [TILE], which of them are coded, and where their numbers are [TILE, PADDED].

    There are fewer than 2^31 parts.
    """
    part = tl.program_id(0) * TILE + tl.arange(0, TILE)
    column = tl.arange(0, PADDED)[None, :]
    is_in = (part < parts)[:, None]
    if IS_WHOLE:  # parts lie side by side, and loads are as wide as can be
        at = tl.program_id(0).to(tl.int64) * (TILE * GROUP) + tl.arange(0, TILE)[:, None] * GROUP + column
        return part, part % per_row < coded, at, is_in
    else:
        row, i = part // per_row, part % per_row
        is_coded = i < coded
        first = tl.where(is_coded, i * GROUP, channels + (i - coded) * GROUP)
        end = tl.minimum(first + GROUP, tl.where(is_coded, channels, width))
        is_in = is_in & (first[:, None] + column < end[:, None])
        return part, is_coded, (row.to(tl.int64) * width + first)[:, None] + column, is_in


@triton.jit
def _encode_kernel(
    x, codes, scales, parts, per_row, coded, width, channels,
    GROUP: tl.constexpr, TILE: tl.constexpr, PADDED: tl.constexpr, IS_WHOLE: tl.constexpr, IS_FP4: tl.constexpr,
):  # fmt: skip
    part, _, at, is_in = _places(parts, per_row, coded, width, channels, GROUP, TILE, PADDED, IS_WHOLE)
    bits = bits_of(tl.load(x + at, mask=is_in, other=0))
    scale, stored = group_scales(bits, IS_FP4)
    code = code_of(bits, scale[:, None], IS_FP4)
    tl.store(scales + part, stored.to(tl.uint8), mask=part < parts)
    if IS_FP4:  # rows of whole groups: a group's bytes follow those of the one before
        low, high = tl.split(tl.reshape(code, (TILE, PADDED // 2, 2)))
        byte = part[:, None] * (PADDED // 2) + tl.arange(0, PADDED // 2)[None, :]
        tl.store(codes + byte, (low | high << 4).to(tl.uint8), mask=(part < parts)[:, None])
    else:
        tl.store(codes + at, code.to(tl.uint8), mask=is_in)


@triton.jit
def _round_kernel(
    x, y, parts, per_row, coded, width, channels,
    GROUP: tl.constexpr, TILE: tl.constexpr, PADDED: tl.constexpr, IS_WHOLE: tl.constexpr, IS_FP4: tl.constexpr,
):  # fmt: skip
    _, is_coded, at, is_in = _places(parts, per_row, coded, width, channels, GROUP, TILE, PADDED, IS_WHOLE)
    given = tl.load(x + at, mask=is_in, other=0)
    bits = bits_of(given)
    scale, stored = group_scales(bits, IS_FP4)
    rounded = nearest_value(bits, scale[:, None], IS_FP4) * factor_of(stored)[:, None]
    made = cast_exact(rounded, y.dtype.element_ty)
    if not IS_FP4:  # channels behind the coded ones stay, to the bit; x and y have one dtype
        made = tl.where(is_coded[:, None], made, given)
    tl.store(y + at, made, mask=is_in)


@triton.jit
def _round_index_kernel(
    x, y, rows, factor, ROWS: tl.constexpr, WIDTH: tl.constexpr, ROUNDS: tl.constexpr, GROUP: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = row[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    is_in = (row < rows)[:, None]
    sums = butterflies(number_of(bits_of(tl.load(x + at, mask=is_in, other=0))), ROWS, WIDTH, ROUNDS)
    turned = bits_of(cast(sums * factor, y.dtype.element_ty))  # rounded to the dtype of x first
    bits = tl.reshape(turned, (ROWS * WIDTH // GROUP, GROUP))
    scale, stored = group_scales(bits, True)
    rounded = nearest_value(bits, scale[:, None], True) * factor_of(stored)[:, None]
    tl.store(y + at, cast_exact(tl.reshape(rounded, (ROWS, WIDTH)), y.dtype.element_ty), mask=is_in)


@triton.jit
def _decode_fp4_kernel(codes, scales, w, groups, TILE: tl.constexpr):
    group = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    is_in = (group < groups)[:, None]
    byte = tl.load(codes + group[:, None] * 16 + tl.arange(0, 16)[None, :], mask=is_in, other=0).to(tl.int32)
    code = tl.reshape(tl.join(byte & 15, byte >> 4), (TILE, 32))
    factor = factor_of(tl.load(scales + group, mask=group < groups, other=0).to(tl.int32))
    value = value_of(code, True) * factor[:, None]
    tl.store(w + group[:, None] * 32 + tl.arange(0, 32)[None, :], cast(value, w.dtype.element_ty), mask=is_in)


# Blocks


@triton.jit
def _block_places(rows, columns, down, right, SIDE: tl.constexpr):
    """Where the numbers of this program's block are, [SIDE, SIDE]."""
    block = tl.program_id(0).to(tl.int64)
    row = block // right % down * SIDE + tl.arange(0, SIDE)
    column = block % right * SIDE + tl.arange(0, SIDE)
    at = (block // (down * right) * rows + row[:, None]) * columns + column[None, :]
    return at, (row < rows)[:, None] & (column < columns)[None, :]


@triton.jit
def _block_most(bits):
    return tl.minimum(tl.max(most_of(bits, 1), axis=0), _MOST)


@triton.jit
def _encode_blocks_kernel(w, codes, scales, rows, columns, down, right, SIDE: tl.constexpr):
    at, is_in = _block_places(rows, columns, down, right, SIDE)
    bits = bits_of(tl.load(w + at, mask=is_in, other=0))
    most = _block_most(bits)
    if scales.dtype.element_ty == tl.uint8:
        scale = scale_of(most, False)
        code = code_of(bits, scale, False)
        tl.store(scales + tl.program_id(0), scale.to(tl.uint8))
    else:  # quotients round to float32, as nearest as can be
        factor = tl.div_rn(number_of(tl.maximum(most, _FLOOR)), 448.0)
        code = nearest_code(tl.div_rn(number_of(bits), factor), bits, False)
        tl.store(scales + tl.program_id(0), factor)
    tl.store(codes + at, code.to(tl.uint8), mask=is_in)


@triton.jit
def _decode_blocks_kernel(codes, scales, w, rows, columns, down, right, SIDE: tl.constexpr):
    at, is_in = _block_places(rows, columns, down, right, SIDE)
    scale = tl.load(scales + tl.program_id(0))
    factor = factor_of(scale.to(tl.int32)) if scales.dtype.element_ty == tl.uint8 else scale
    value = value_of(tl.load(codes + at, mask=is_in, other=0).to(tl.int32), False) * factor
    tl.store(w + at, cast(value, w.dtype.element_ty), mask=is_in)


@triton.jit
def _round_blocks_kernel(w, y, rows, columns, down, right, SIDE: tl.constexpr):
    at, is_in = _block_places(rows, columns, down, right, SIDE)
    bits = bits_of(tl.load(w + at, mask=is_in, other=0))
    scale = scale_of(_block_most(bits), False)
    value = nearest_value(bits, scale, False) * factor_of(scale)
    tl.store(y + at, cast_exact(value, y.dtype.element_ty), mask=is_in)
