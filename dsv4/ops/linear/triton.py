"""Linear maps of codes, which are decoded as they are multiplied, and wide maps of x in 16 bits.

Plain maps that are not wide are torch's: no kernel here is as fast as the vendor's library, nor is one for groups. A
wide map of 16-bit numbers has products that are exact in float32: it needs no widened copy of its weight; and a float32
weight is three 16-bit ones, on tensor cores instead of the plain units. Rows of x
are rounded in a kernel of their own, once for all weights of ``linears``, since each tile of a weight reads them again.

A row's bits do not depend on the other rows: sums are over all channels in the same steps (``triton_product.py``). A
map with few outputs is summed in parts of its columns, and then these in order: by one program, or with few tokens by
one each, so that a decoding step is not a few programs that wait for memory.
Maps of codes that a gradient passes, and float64, are ``portable``'s. Scales that are no number make NaN here.
"""

# Kernels are a language of their own, in which a constexpr is a number and tensors are cut by None.

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from dsv4.native import wants_gradient
from dsv4.ops.linear import portable
from dsv4.ops.linear.portable import Weight
from dsv4.ops.linear.triton_product import (
    CODE_STEP,
    DTYPES,
    FEW,
    SOME,
    Coded,
    Config,
    as_read,
    config_of,
    products,
    rows_of_codes,
    tile_of,
)
from dsv4.ops.lowbit.packed import Packed

PROGRAMS = 100  # that fill most of the 132 multiprocessors of a Hopper GPU
ROWS = 64  # of a program with few tokens
LEAST = 512  # columns of a part
ELEMENTS = 1024  # of a program that adds up parts
TOGETHER = 8  # tiles of tokens that take a block of rows one after another


def linear(x: torch.Tensor, weight: Weight, wide: bool) -> torch.Tensor:
    """See ``dsv4.ops.linear.linear``."""
    return linears(x, [weight], [wide])[0]


def linears(x: torch.Tensor, weights: Sequence[Weight], wide: Sequence[bool]) -> list[torch.Tensor]:
    """See ``dsv4.ops.linear.linears``."""
    rows = Rounded(x)
    return [_one(x, rows, weight, is_wide) for weight, is_wide in zip(weights, wide, strict=True)]


class Rounded:
    """The rows of x as maps of codes read them, rounded when the first map asks."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x, self._made = x, {}

    def of(self, kind: str, dtype: torch.dtype) -> torch.Tensor:
        """For a kind of codes, in a dtype, [n, K]."""
        key = kind == "fp4", dtype
        if key not in self._made:
            self._made[key] = rows_of_codes(self.x.detach().reshape(-1, self.x.shape[-1]), kind).to(dtype)
        return self._made[key]


def of_codes(rows: Rounded, weight: Packed, wide: bool) -> torch.Tensor:
    """One map of rows that may have been rounded for another, [..., N]."""
    x, w = rows.x, as_read(weight)
    # As in ``portable``, a wide map of float16, which has few exponents, is one of float32. bfloat16 has them all.
    dtype = torch.float32 if wide and x.dtype == torch.float16 else x.dtype
    out = torch.float32 if wide else x.dtype
    return multiply(rows.of(w.kind, dtype), w, *weight.shape, out).view(*x.shape[:-1], weight.shape[0])


def multiply(x: torch.Tensor, w: Coded, N: int, K: int, dtype: torch.dtype) -> torch.Tensor:
    """x [M, K] by a weight [N, K], [M, N] in ``dtype``. By codes, x is as ``rows_of_codes`` gives it."""
    M, width = x.shape
    y = torch.empty(M, N, dtype=dtype, device=x.device)
    if not y.numel():
        return y
    columns = _part(N, K)
    parts = triton.cdiv(K, columns)
    config, programs = _config(x.dtype, w, M, N, parts)
    splits = parts > 1 and programs < PROGRAMS
    sums = torch.empty(parts, M, N, dtype=torch.float32, device=x.device) if splits else y
    _multiply_kernel[(programs, parts if splits else 1)](
        x, w.numbers, w.scales, sums, M, triton.cdiv(M, config.tokens), width, N, K, w.kind, TOGETHER, parts, columns,
        splits, config.tokens, config.rows, config.step, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    if splits:
        _sum_kernel[(triton.cdiv(y.numel(), ELEMENTS),)](sums, y, y.numel(), parts, ELEMENTS, num_warps=4)
    return y


def _part(N: int, K: int) -> int:
    """The columns of a part: as few as let programs of 64 rows fill the device, whatever the number of tokens."""
    wanted = max(1, PROGRAMS // triton.cdiv(N, ROWS))
    return max(triton.cdiv(triton.cdiv(K, wanted), CODE_STEP) * CODE_STEP, LEAST)


def _config(dtype: torch.dtype, w: Coded, M: int, N: int, parts: int) -> tuple[Config, int]:
    """The largest tile whose programs fill the device, or else the smallest; and its programs for all columns."""
    sizes = [config_of(dtype, w, min(M, tokens)) for tokens in (M, SOME, FEW)]
    found = [(config, triton.cdiv(M, config.tokens) * triton.cdiv(N, config.rows)) for config in sizes]
    return next((each for each in found if each[1] * parts >= PROGRAMS), found[-1])


@triton.jit(do_not_specialize=["num_tokens", "num_tiles"])
def _multiply_kernel(
    x, w, scales, y, num_tokens, num_tiles, WIDTH: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, KIND: tl.constexpr, TOGETHER: tl.constexpr,
    PARTS: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    tile, block = tile_of(num_tiles, tl.cdiv(N, ROWS), TOGETHER)
    token = tile * TOKENS + tl.arange(0, TOKENS)
    read = tl.minimum(token, num_tokens - 1).to(tl.int64) * WIDTH  # past the last: what nobody keeps
    steps: tl.constexpr = (K + STEP - 1) // STEP
    of_part: tl.constexpr = COLUMNS // STEP
    first = tl.program_id(1)
    acc = tl.zeros([ROWS, TOKENS], dtype=tl.float32)
    if SPLITS or PARTS == 1:
        acc, _ = products(
            acc, acc, x, read, w, w, scales, scales, block * ROWS, first * of_part,
            tl.minimum(first * of_part + of_part, steps), N, K, KIND, False, False, ROWS, STEP,
        )  # fmt: skip
    else:
        nothing = acc
        for part in range(PARTS):
            own, _ = products(
                nothing, nothing, x, read, w, w, scales, scales, block * ROWS, part * of_part,
                tl.minimum(part * of_part + of_part, steps), N, K, KIND, False, False, ROWS, STEP,
            )  # fmt: skip
            acc += own
    row = block * ROWS + tl.arange(0, ROWS)
    at = y + (first * num_tokens + token.to(tl.int64))[:, None] * N + row[None, :]
    is_in = (token < num_tokens)[:, None] & (row < N)[None, :]
    tl.store(at, tl.trans(acc).to(y.dtype.element_ty), mask=is_in)


@triton.jit
def _sum_kernel(sums, y, count, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for part in range(PARTS):
        total += tl.load(sums + part * count.to(tl.int64) + at, mask=at < count, other=0.0)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=at < count)


def _one(x: torch.Tensor, rows: Rounded, weight: Weight, wide: bool) -> torch.Tensor:
    if x.dtype not in DTYPES or (isinstance(weight, Packed) and wants_gradient(x)):
        return portable.linear(x, weight, wide)
    if isinstance(weight, Packed):
        return of_codes(rows, weight, wide)
    if wide and x.dtype != torch.float32 and weight.dtype in (x.dtype, torch.float32):
        return _Wide.apply(x, weight)
    return portable.linear(x, weight, wide)


class _Wide(torch.autograd.Function):
    """The gradients are those of ``portable``, which multiplies in the dtype of x."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        flat, read = x.reshape(-1, x.shape[-1]).contiguous(), as_read(weight)
        if weight.dtype != x.dtype:
            read = read._replace(kind="whole")
        return multiply(flat, read, *weight.shape, torch.float32).view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        narrow = grad.to(x.dtype)
        grad_weight = narrow.flatten(0, -2).T @ x.flatten(0, -2)
        return narrow @ weight.to(x.dtype), grad_weight.to(weight.dtype)
