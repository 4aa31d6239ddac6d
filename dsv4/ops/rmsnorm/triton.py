"""RMS normalisation, one kernel forward and one backward: each reads its rows once and holds them in registers.

A row is summed in an order that its width alone decides, so a row has the same bits whatever stands beside it. The
gradient of the weight is a sum over all rows: of ``ROWS_OF_A_SUM`` rows each in the kernel, then of these sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from dsv4.ops.rmsnorm import portable

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_CHANNELS = 16384  # 32 float32 registers a thread with 16 warps; wider rows go to the portable path
ROWS_OF_A_SUM = 16  # 4096 rows fill 256 programs, and their sums are 1/8 of what a bfloat16 input weighs
ELEMENTS_OF_A_TILE = 2048  # narrow rows share a program


def rmsnorm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """See ``dsv4.ops.rmsnorm``."""
    served = x.dtype in DTYPES and x.shape[-1] <= MOST_CHANNELS and (weight is None or weight.dtype in DTYPES)
    return _RMSNorm.apply(x, weight, eps) if served else portable.rmsnorm(x, weight, eps)


def tile(D: int) -> dict[str, int]:
    """The tile of a program and its warps, by the width of a row alone."""
    block = triton.next_power_of_2(D)
    rows = min(max(ELEMENTS_OF_A_TILE // block, 1), ROWS_OF_A_SUM)
    return {"ROWS": rows, "BLOCK": block, "num_warps": 4 if block <= 2048 else 8 if block <= 4096 else 16}


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        x = x.contiguous()
        weight = None if weight is None else weight.contiguous()
        D = x.shape[-1]
        rows = x.numel() // D if D else 0
        y = torch.empty_like(x)
        inverse_rms = torch.empty(rows, dtype=torch.float32, device=x.device)
        if rows:
            how = tile(D)
            grid = (triton.cdiv(rows, how["ROWS"]),)
            _forward[grid](x, weight, y, inverse_rms, rows, eps, D=D, HAS_WEIGHT=weight is not None, **how)
        ctx.save_for_backward(x, weight, inverse_rms)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, inverse_rms = ctx.saved_tensors
        D, rows = x.shape[-1], len(inverse_rms)
        is_trained = weight is not None and ctx.needs_input_grad[1]
        grad_x = torch.empty_like(x)
        sums = x.new_empty(triton.cdiv(rows, ROWS_OF_A_SUM) if is_trained else 0, D, dtype=torch.float32)
        if rows:
            _backward[(triton.cdiv(rows, ROWS_OF_A_SUM),)](
                grad.contiguous(), x, weight, inverse_rms, grad_x, sums, rows, D=D, HAS_WEIGHT=weight is not None,
                IS_TRAINED=is_trained, ROWS_OF_A_SUM=ROWS_OF_A_SUM, **tile(D),
            )  # fmt: skip
        # Over a few sums torch's own reduction, which adds in an order that the shape decides, is as fast as a kernel.
        grad_weight = sums.sum(dim=0).to(weight.dtype) if is_trained else None
        return grad_x, grad_weight, None


@triton.jit(do_not_specialize=["num_rows"])
def _forward(
    x, weight, y, inverse_rms, num_rows, eps,
    D: tl.constexpr, HAS_WEIGHT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channels = tl.arange(0, BLOCK)
    is_row = rows < num_rows
    inside = is_row[:, None] & (channels < D)[None, :]
    at = rows[:, None] * D + channels[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(value * value, axis=1) / D + eps)
    value = value * inverse[:, None]
    if HAS_WEIGHT:
        value = value * tl.load(weight + channels, mask=channels < D, other=0.0).to(tl.float32)[None, :]
    tl.store(y + at, value.to(y.dtype.element_ty), mask=inside)
    tl.store(inverse_rms + rows, inverse, mask=is_row)


@triton.jit(do_not_specialize=["num_rows"])
def _backward(
    grad, x, weight, inverse_rms, grad_x, sums, num_rows,
    D: tl.constexpr, HAS_WEIGHT: tl.constexpr, IS_TRAINED: tl.constexpr, ROWS_OF_A_SUM: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    channels = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, ROWS_OF_A_SUM, ROWS):
        rows = program * ROWS_OF_A_SUM + first + tl.arange(0, ROWS)
        is_row = rows < num_rows
        inside = is_row[:, None] & (channels < D)[None, :]
        at = rows[:, None] * D + channels[None, :]
        inverse = tl.load(inverse_rms + rows, mask=is_row, other=0.0)
        normed = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * inverse[:, None]
        coming = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        if IS_TRAINED:
            total += tl.sum(coming * normed, axis=0)
        if HAS_WEIGHT:
            coming = coming * tl.load(weight + channels, mask=channels < D, other=0.0).to(tl.float32)[None, :]
        # y = x r, dr/dx = -r^3 x / D: the part of the gradient along x is removed.
        along = tl.sum(coming * normed, axis=1) / D
        value = (coming - normed * along[:, None]) * inverse[:, None]
        tl.store(grad_x + at, value.to(grad_x.dtype.element_ty), mask=inside)
    if IS_TRAINED:
        tl.store(sums + program * D + channels, total, mask=channels < D)
