"""The iteration with products that are symmetric: of X X^T and of b A + c A A^T half of the tiles, the rest mirrored.

A program makes a tile on or below the diagonal and stores it twice, the second time turned over: two of a step's three
products take half the work. The last, P X, has no symmetry, and is a plain one, which is cuBLAS' own. Matrices with
more rows than columns are taken as their transposes are, by strides: nothing is transposed in memory.

A matrix of few tiles and long sums would leave most of the machine idle, so its sums are cut into parts, which are
added in order by another kernel. How many depends on the shape of the matrix alone, so that a matrix has the same bits
whatever is orthogonalised beside it. float64 is ``portable``'s: nothing but tests has it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from dsv4.ops.orthogonalize import portable
from dsv4.ops.orthogonalize.reference import EPSILON

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PROGRAMS = 132  # the multiprocessors of an H200: fewer tiles than these are made in parts
LEAST_OF_A_PART = 1024  # channels


class Config(NamedTuple):
    """Rows of a tile, channels of a step, warps of a program, and how many steps are on their way."""

    rows: int
    channels: int
    warps: int
    stages: int


CONFIGS = {
    # 128 x 128 sums are 64 registers of each of 256 threads; 96 KiB of shared memory, so that two programs fit.
    "square": Config(128, 64, 8, 3),
    # One program with more on its way.
    "deep": Config(128, 64, 8, 6),
    "small": Config(64, 64, 4, 4),
    # float32 has no tensor cores here.
    "float32": Config(64, 16, 4, 2),
}
NARROW = "square"  # the one for 16-bit dtypes


@torch.no_grad()
def orthogonalize(
    matrices: torch.Tensor, steps: tuple[tuple[float, float, float], ...], dtype: torch.dtype
) -> torch.Tensor:
    """See ``dsv4.ops.orthogonalize``. No gradient passes."""
    if dtype not in DTYPES or matrices.dtype not in DTYPES:
        return portable.orthogonalize(matrices, steps, dtype)
    given = matrices.unsqueeze(0).flatten(0, -3).contiguous()  # [batch, rows, columns]
    norm = torch.linalg.vector_norm(given, dim=(1, 2), keepdim=True, dtype=torch.float32) + EPSILON
    # Divided in float32 and rounded in one pass, without a copy in between.
    x = torch.div(given, norm, out=torch.empty(given.shape, dtype=dtype, device=given.device))
    if x.numel():
        x = _iterate(x, steps)
    return x.to(matrices.dtype).reshape(matrices.shape)


def _iterate(x: torch.Tensor, steps: tuple[tuple[float, float, float], ...]) -> torch.Tensor:
    """x: [batch, rows, columns], contiguous."""
    batch, rows, columns = x.shape
    is_tall = rows > columns
    gram, polynomial = (x.new_empty(batch, min(rows, columns), min(rows, columns)) for _ in range(2))
    for a, b, c in steps:
        _symmetric(x.mT if is_tall else x, gram, 0.0, 1.0)  # X X^T
        _symmetric(gram, polynomial, b, c)  # b X X^T + c (X X^T)^2
        left, right = (x, polynomial) if is_tall else (polynomial, x)
        x = torch.baddbmm(x, left, right, beta=a)
    return x


def _symmetric(x: torch.Tensor, out: torch.Tensor, b: float, c: float) -> None:
    """out = c x x^T, and with b, for which x is symmetric, b x + c x x^T. x: [batch, R, C]; out: [batch, R, R]."""
    batch, R, C = x.shape
    config = CONFIGS["float32" if x.dtype == torch.float32 else NARROW]
    block = min(config.rows, max(16, triton.next_power_of_2(R)))
    blocks = triton.cdiv(R, block)
    tiles = blocks * (blocks + 1) // 2
    num_parts = min(triton.cdiv(PROGRAMS, tiles), max(1, C // LEAST_OF_A_PART))
    part = triton.cdiv(triton.cdiv(C, num_parts), config.channels) * config.channels
    num_parts = triton.cdiv(C, part)
    parts = torch.empty(
        (num_parts, batch * tiles, block, block) if num_parts > 1 else (0,), dtype=torch.float32, device=x.device
    )
    sizes = {"ADDS": b != 0, "BLOCK": block, "num_warps": config.warps}
    _product_kernel[(batch * tiles, num_parts)](
        x, out, parts, R, C, *x.stride(), b, c, tiles, part,
        IN_PARTS=num_parts > 1, CHANNELS=config.channels, num_stages=config.stages, **sizes,
    )  # fmt: skip
    if num_parts > 1:
        _sum_kernel[(batch * tiles,)](parts, x, out, R, *x.stride(), b, c, tiles, num_parts, **sizes)


@triton.jit
def _row_of(tile):
    """In which row of tiles this one is: row i begins at tile i (i + 1) / 2."""
    i = ((tl.sqrt(8.0 * tile + 1.0) - 1.0) * 0.5).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > tile, i - 1, i)  # the root may be rounded across a whole number
    return tl.where((i + 1) * (i + 2) // 2 <= tile, i + 1, i)


@triton.jit
def _tile(tiles):
    """This program's matrix, and the row and column of its tile: on the diagonal or below, row after row."""
    program = tl.program_id(0)
    tile = program % tiles
    i = _row_of(tile)
    return (program // tiles).to(tl.int64), i, tile - i * (i + 1) // 2


@triton.jit
def _store(value, x, out, R, x_row, x_column, b, row, column, is_diagonal, ADDS: tl.constexpr):
    """Store a tile and, off the diagonal, its mirror image. x and out: of its matrix."""
    inside = (row < R)[:, None] & (column < R)[None, :]
    if ADDS:
        at = row.to(tl.int64)[:, None] * x_row + column.to(tl.int64)[None, :] * x_column
        value += b * tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    value = value.to(out.dtype.element_ty)
    row, column = row.to(tl.int64), column.to(tl.int64)
    tl.store(out + row[:, None] * R + column[None, :], value, mask=inside)
    turned = out + column[:, None] * R + row[None, :]
    tl.store(turned, tl.trans(value), mask=(row < R)[None, :] & (not is_diagonal))  # its columns are never the last


@triton.jit
def _product_kernel(
    x, out, parts, R, C, x_matrix, x_row, x_column, b, c, tiles, part,
    ADDS: tl.constexpr, IN_PARTS: tl.constexpr, BLOCK: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One tile of c x x^T, of all channels or of a part of them."""
    matrix, i, j = _tile(tiles)
    x += matrix * x_matrix
    out += matrix * R * R
    lane, k = tl.arange(0, BLOCK), tl.arange(0, CHANNELS)
    row, column = i * BLOCK + lane, j * BLOCK + lane
    first = tl.program_id(1) * part
    left = x + row.to(tl.int64)[:, None] * x_row
    right = x + column.to(tl.int64)[:, None] * x_row
    acc = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
    for start in range(first, tl.minimum(first + part, C), CHANNELS):
        channel = start + k
        is_channel = (channel < C)[None, :]
        at = channel.to(tl.int64)[None, :] * x_column
        p = tl.load(left + at, mask=(row < R)[:, None] & is_channel, other=0.0)
        q = tl.load(right + at, mask=(column < R)[:, None] & is_channel, other=0.0)
        acc = tl.dot(p, tl.trans(q), acc, input_precision="ieee")
    if IN_PARTS:
        at = (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * (BLOCK * BLOCK)
        tl.store(parts + at + lane[:, None] * BLOCK + lane[None, :], acc)
    else:
        _store(c * acc, x, out, R, x_row, x_column, b, row, column, i == j, ADDS)


@triton.jit
def _sum_kernel(
    parts, x, out, R, x_matrix, x_row, x_column, b, c, tiles, num_parts,
    ADDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add up the parts of a tile, from the first to the last."""
    matrix, i, j = _tile(tiles)
    lane = tl.arange(0, BLOCK)
    at = lane[:, None] * BLOCK + lane[None, :]
    total = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
    for number in range(num_parts):
        begin = (number * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * (BLOCK * BLOCK)
        total += tl.load(parts + begin + at)
    row, column = i * BLOCK + lane, j * BLOCK + lane
    x += matrix * x_matrix
    out += matrix * R * R
    _store(c * total, x, out, R, x_row, x_column, b, row, column, i == j, ADDS)
