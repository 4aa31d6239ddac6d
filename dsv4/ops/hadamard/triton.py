"""The transform in one kernel: a row stays in registers through all its sums, in float32.

float64 is ``portable``'s: on an accelerator nothing but tests has it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dsv4.ops.hadamard import portable

ELEMENTS = 4096  # numbers of a program: 32 registers of each of its 128 threads
WARPS = 4


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """See ``dsv4.ops.hadamard``."""
    return portable.hadamard(x) if x.dtype == torch.float64 else _Hadamard.apply(x)


class _Hadamard(torch.autograd.Function):
    """The matrix is symmetric, so that the gradient is transformed as x is."""

    @staticmethod
    def forward(ctx, x):
        return _transform(x)

    @staticmethod
    def backward(ctx, grad):
        return hadamard(grad)


def _transform(x: torch.Tensor) -> torch.Tensor:
    x, width = x.contiguous(), x.shape[-1]
    y = torch.empty_like(x)
    if x.numel():
        rows, tile = x.numel() // width, max(1, ELEMENTS // width)
        _hadamard_kernel[(triton.cdiv(rows, tile),)](
            x, y, rows, width**-0.5, tile, width, width.bit_length() - 1, num_warps=WARPS
        )
    return y


@triton.jit
def butterflies(x, ROWS: tl.constexpr, WIDTH: tl.constexpr, ROUNDS: tl.constexpr):
    """Sum x [ROWS, WIDTH] as portable does: round r takes a + b and a - b of channels that differ in bit r.

    Each round splits the lowest bit off the channel's number and puts it on top, so that the next bit is the lowest
    one, and after the last round each is where it was.
    """
    for _ in tl.static_range(ROUNDS):
        a, b = tl.split(tl.reshape(x, (ROWS, WIDTH // 2, 2)))  # [ROWS, WIDTH / 2]
        x = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), (ROWS, WIDTH))
    return x


@triton.jit
def _hadamard_kernel(x, y, rows, factor, ROWS: tl.constexpr, WIDTH: tl.constexpr, ROUNDS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = row[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    is_in = (row < rows)[:, None]
    sums = butterflies(tl.load(x + at, mask=is_in, other=0).to(tl.float32), ROWS, WIDTH, ROUNDS)
    tl.store(y + at, (sums * factor).to(y.dtype.element_ty), mask=is_in)
