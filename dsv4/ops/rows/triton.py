"""Rows in one pass: each program takes some rows, reads them once and writes them once."""

# Kernels are a language of their own, in which a constexpr is a number and tensors are cut by None.

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dsv4.ops.lowbit.triton_codes import bits_of, number_of, raw_bits
from dsv4.ops.rows.formats import ROW_GROUP, RowFormat, index_row_bytes, row_bytes
from dsv4.ops.rows.triton_rows import load_channels, load_keys, load_scales, store_keys, store_rows

ELEMENTS = 2048  # channels of a program: 16 registers of each of its 128 threads, and as many again of their codes
WARPS = 4


def pack(x: torch.Tensor, row_format: RowFormat, rotary_dims: int) -> torch.Tensor:
    """See ``dsv4.ops.rows.pack``."""
    x, channels = _numbers(x), x.shape[-1]
    rows = torch.empty(*x.shape[:-1], row_bytes(row_format, channels, rotary_dims), dtype=torch.uint8, device=x.device)
    width, tile, grid = _launch(x, channels)
    if grid:
        _pack[(grid,)](
            raw_bits(x), rows, x.numel() // channels, rows.shape[-1], channels, rotary_dims, row_format, tile, width,
            num_warps=WARPS,
        )  # fmt: skip
    return rows


def unpack(rows: torch.Tensor, row_format: RowFormat, channels: int, rotary_dims: int) -> torch.Tensor:
    """See ``dsv4.ops.rows.unpack``; float32."""
    rows = rows.contiguous()
    x = torch.empty(*rows.shape[:-1], channels, dtype=torch.float32, device=rows.device)
    width, tile, grid = _launch(x, min(channels, ROW_GROUP))  # channels of a block, in which a row has one scale
    if grid:
        _unpack[(grid,)](
            rows, x, x.numel() // channels, rows.shape[-1], channels, rotary_dims, row_format, tile, width,
            num_warps=WARPS,
        )  # fmt: skip
    return x


def pack_index(x: torch.Tensor, row_format: RowFormat) -> torch.Tensor:
    """See ``dsv4.ops.rows.pack_index``."""
    x, channels = _numbers(x), x.shape[-1]
    rows = torch.empty(*x.shape[:-1], index_row_bytes(row_format, channels), dtype=torch.uint8, device=x.device)
    width, tile, grid = _launch(x, channels)
    if grid:
        _pack_index[(grid,)](
            raw_bits(x), rows, x.numel() // channels, rows.shape[-1], channels, row_format, tile, width,
            num_warps=WARPS,
        )  # fmt: skip
    return rows


def unpack_index(rows: torch.Tensor, row_format: RowFormat, channels: int) -> torch.Tensor:
    """See ``dsv4.ops.rows.unpack_index``; float32."""
    rows = rows.contiguous()
    x = torch.empty(*rows.shape[:-1], channels, dtype=torch.float32, device=rows.device)
    width, tile, grid = _launch(x, channels)
    if grid:
        _unpack_index[(grid,)](
            rows, x, x.numel() // channels, rows.shape[-1], channels, row_format, tile, width, num_warps=WARPS
        )
    return x


def _numbers(x: torch.Tensor) -> torch.Tensor:
    """x as kernels read it: float64, which no accelerator's cache has, as float32."""
    return (x.float() if x.dtype == torch.float64 else x).contiguous()


def _launch(x: torch.Tensor, channels: int) -> tuple[int, int, int]:
    """Return the channels of a tile, padded to a power of two, its rows, and how many tiles the rows of x make."""
    if not x.numel():
        return 0, 0, 0
    width = max(2, triton.next_power_of_2(channels))
    tile = max(1, ELEMENTS // width)
    return width, tile, triton.cdiv(x.numel() // x.shape[-1], tile)


@triton.jit
def _rows_of(tensor, num_rows, stride, N: tl.constexpr):
    """Pointers to this program's rows, [N], and which of them there are."""
    row = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    return tensor + row * stride, row < num_rows


@triton.jit(do_not_specialize=["num_rows"])
def _pack(
    x, rows, num_rows, NUM_BYTES: tl.constexpr, K: tl.constexpr, R: tl.constexpr, FORMAT: tl.constexpr,
    N: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    own, is_row = _rows_of(x, num_rows, K, N)
    channel = tl.arange(0, WIDTH)[None, :]
    given = tl.load(own[:, None] + channel, mask=is_row[:, None] & (channel < K), other=0)
    to, _ = _rows_of(rows, num_rows, NUM_BYTES, N)
    store_rows(to, is_row, number_of(bits_of(given)), N, WIDTH, K, R, FORMAT)


@triton.jit(do_not_specialize=["num_rows"])
def _unpack(
    rows, x, num_rows, NUM_BYTES: tl.constexpr, K: tl.constexpr, R: tl.constexpr, FORMAT: tl.constexpr,
    N: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    own, is_row = _rows_of(rows, num_rows, NUM_BYTES, N)
    to, _ = _rows_of(x, num_rows, K, N)
    scales = load_scales(own, is_row, K, R, FORMAT)
    for first in tl.static_range(0, K, WIDTH):
        channel = first + tl.arange(0, WIDTH)[None, :]
        values = load_channels(own, is_row, scales, first, WIDTH, K, R, FORMAT, tl.float32)
        tl.store(to[:, None] + channel, values, mask=is_row[:, None] & (channel < K))


@triton.jit(do_not_specialize=["num_rows"])
def _pack_index(
    x, rows, num_rows, NUM_BYTES: tl.constexpr, J: tl.constexpr, FORMAT: tl.constexpr,
    N: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    own, is_row = _rows_of(x, num_rows, J, N)
    channel = tl.arange(0, WIDTH)[None, :]
    given = tl.load(own[:, None] + channel, mask=is_row[:, None] & (channel < J), other=0)
    to, _ = _rows_of(rows, num_rows, NUM_BYTES, N)
    store_keys(to, is_row, tl.zeros((N,), dtype=tl.int32), number_of(bits_of(given)), N, WIDTH, J, 0, FORMAT)


@triton.jit(do_not_specialize=["num_rows"])
def _unpack_index(
    rows, x, num_rows, NUM_BYTES: tl.constexpr, J: tl.constexpr, FORMAT: tl.constexpr,
    N: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    own, is_row = _rows_of(rows, num_rows, NUM_BYTES, N)
    to, _ = _rows_of(x, num_rows, J, N)
    values = load_keys(own, is_row, tl.zeros((N,), dtype=tl.int32), WIDTH, J, 0, FORMAT, N)
    channel = tl.arange(0, WIDTH)[None, :]
    tl.store(to[:, None] + channel, values, mask=is_row[:, None] & (channel < J))
