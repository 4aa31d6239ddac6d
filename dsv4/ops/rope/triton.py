"""The rotation as one kernel a direction: a channel reads the other one of its pair from the cache.

Rows are the heads of all tokens, flat; a row's result does not depend on where it lies in a tile. The gradient of a
norm's weight is a sum over all rows: of ``ROWS_OF_A_SUM`` rows each in the kernel, then of these sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from dsv4.ops.lowbit.tables import CACHE_GROUP
from dsv4.ops.lowbit.triton_codes import bits_of, factor_of, group_scales, nearest_value
from dsv4.ops.rope import portable

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ELEMENTS_OF_A_TILE = 4096  # eight heads of 512 channels, 32 values a thread
MOST_CHANNELS = 4096
ROWS_OF_A_SUM = 16  # 4096 tokens fill 256 programs

_GROUP = tl.constexpr(CACHE_GROUP)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool) -> torch.Tensor:
    """See ``dsv4.ops.rope.rotate``."""
    if not _serves(x, cos):
        return portable.rotate(x, cos, sin, inverse)
    return _Rotate.apply(x, cos, sin, inverse)


def rotate_unit(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float) -> torch.Tensor:
    """See ``dsv4.ops.rope.rotate_unit``."""
    if not _serves(x, cos):
        return portable.rotate_unit(x, cos, sin, eps)
    return _RotateUnit.apply(x, cos, sin, eps)


def rotate_normed(
    x: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float, rounds: bool
) -> torch.Tensor:
    """See ``dsv4.ops.rope.rotate_normed``; no float64."""
    if x.shape[-1] > MOST_CHANNELS:
        raise ValueError(f"x has {x.shape[-1]} channels; expected at most {MOST_CHANNELS}")
    return _RotateNormed.apply(x, weight, cos, sin, eps, rounds)


def _serves(x: torch.Tensor, cos: torch.Tensor) -> bool:
    return x.dtype in DTYPES and cos.dtype == torch.float32 and x.shape[-1] <= MOST_CHANNELS


def _sizes(x: torch.Tensor, cos: torch.Tensor) -> tuple[int, tuple[int], dict[str, int]]:
    """The number of rows, the grid, and the constants of a launch, which the sizes of a head alone decide."""
    K = x.shape[-1]
    block = triton.next_power_of_2(K)
    rows = max(ELEMENTS_OF_A_TILE // block, 1)
    num_rows = x.numel() // K
    heads = x.shape[2] if x.dim() == 4 else 1
    how = {"H": heads, "K": K, "PAIRS": cos.shape[-1], "ROWS": rows, "BLOCK": block, "num_warps": 4}
    return num_rows, (triton.cdiv(num_rows, rows),), how


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool) -> torch.Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    if x.numel():
        num_rows, grid, how = _sizes(x, cos)
        _rotate[grid](x, cos, sin, y, num_rows, INVERSE=inverse, **how)
    return y


class _Rotate(torch.autograd.Function):
    """The gradient of a rotation is the opposite one."""

    @staticmethod
    def forward(ctx, x, cos, sin, inverse):
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        ctx.inverse = inverse
        return _turn(x, cos, sin, inverse)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _turn(grad, *ctx.saved_tensors, not ctx.inverse), None, None, None


class _RotateUnit(torch.autograd.Function):
    """Keeps its output, which attention keeps anyway, instead of its input."""

    @staticmethod
    def forward(ctx, x, cos, sin, eps):
        x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
        y = torch.empty_like(x)
        inverse_rms = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
        if x.numel():
            num_rows, grid, how = _sizes(x, cos)
            _rotate_unit[grid](x, cos, sin, y, inverse_rms, num_rows, eps, **how)
        ctx.save_for_backward(y, inverse_rms, cos, sin)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        y, inverse_rms, cos, sin = ctx.saved_tensors
        grad_x = torch.empty_like(y)
        if y.numel():
            num_rows, grid, how = _sizes(y, cos)
            _rotate_unit_backward[grid](grad.contiguous(), y, inverse_rms, cos, sin, grad_x, num_rows, **how)
        return grad_x, None, None, None


class _RotateNormed(torch.autograd.Function):
    """Keeps its input and one number a row. The gradient passes straight through the rounding."""

    @staticmethod
    def forward(ctx, x, weight, cos, sin, eps, rounds):
        x, weight, cos, sin = x.contiguous(), weight.contiguous(), cos.contiguous(), sin.contiguous()
        y = torch.empty_like(x)
        inverse_rms = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
        if x.numel():
            num_rows, grid, how = _sizes(x, cos)
            _rotate_normed[grid](x, weight, cos, sin, y, inverse_rms, num_rows, eps, ROUNDS=rounds, **how)
        ctx.save_for_backward(x, weight, inverse_rms, cos, sin)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, inverse_rms, cos, sin = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        sums = torch.empty(triton.cdiv(inverse_rms.numel(), ROWS_OF_A_SUM), x.shape[-1], device=x.device)
        if x.numel():
            num_rows, _, how = _sizes(x, cos)
            how["ROWS"] = min(how["ROWS"], ROWS_OF_A_SUM)
            _rotate_normed_backward[(len(sums),)](
                grad.contiguous(), x, weight, inverse_rms, cos, sin, grad_x, sums, num_rows,
                ROWS_OF_A_SUM=ROWS_OF_A_SUM, **how,
            )  # fmt: skip
        # Over a few sums torch's own reduction, which adds in an order that the shape decides, is as fast as a kernel.
        return grad_x, sums.sum(dim=0).to(weight.dtype), None, None, None, None


@triton.jit
def _places(
    first, num_rows,
    H: tl.constexpr, K: tl.constexpr, PAIRS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Where a tile's channels lie, those of the other one of each pair and of its angle, and which are there."""
    rows = first + tl.arange(0, ROWS)
    channels = tl.arange(0, BLOCK)
    turned = channels - (K - 2 * PAIRS)  # below 0: a channel that keeps its value
    inside = (rows < num_rows)[:, None] & (channels < K)[None, :]
    is_turned = inside & (turned >= 0)[None, :]
    at = rows[:, None] * K + channels[None, :]
    other = rows[:, None] * K + (K - 2 * PAIRS + (turned ^ 1))[None, :]
    angle = (rows // H)[:, None] * PAIRS + (turned // 2)[None, :]
    is_first = (turned % 2 == 0)[None, :]
    return rows, at, other, angle, inside, is_turned, is_first


@triton.jit
def _turned(value, partner, cos, sin, angle, is_turned, is_first, INVERSE: tl.constexpr):
    """(a, b) -> (a cos - b sin, a sin + b cos), seen from either one."""
    c = tl.load(cos + angle, mask=is_turned, other=1.0)
    s = tl.load(sin + angle, mask=is_turned, other=0.0)
    if INVERSE:
        s = -s
    s = tl.where(is_first, -s, s)
    return tl.where(is_turned, value * c + partner * s, value)


@triton.jit(do_not_specialize=["num_rows"])
def _rotate(
    x, cos, sin, y, num_rows, INVERSE: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, PAIRS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    _, at, other, angle, inside, is_turned, is_first = _places(
        tl.program_id(0).to(tl.int64) * ROWS, num_rows, H, K, PAIRS, ROWS, BLOCK
    )
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    partner = tl.load(x + other, mask=is_turned, other=0.0).to(tl.float32)
    value = _turned(value, partner, cos, sin, angle, is_turned, is_first, INVERSE)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def _rotate_unit(
    x, cos, sin, y, inverse_rms, num_rows, eps,
    H: tl.constexpr, K: tl.constexpr, PAIRS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows, at, other, angle, inside, is_turned, is_first = _places(
        tl.program_id(0).to(tl.int64) * ROWS, num_rows, H, K, PAIRS, ROWS, BLOCK
    )
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    partner = tl.load(x + other, mask=is_turned, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(value * value, axis=1) / K + eps)
    # Rounded between the stages, as the reference's two operations are.
    value = (value * inverse[:, None]).to(y.dtype.element_ty).to(tl.float32)
    partner = (partner * inverse[:, None]).to(y.dtype.element_ty).to(tl.float32)
    value = _turned(value, partner, cos, sin, angle, is_turned, is_first, False)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=inside)
    tl.store(inverse_rms + rows, inverse, mask=rows < num_rows)


@triton.jit(do_not_specialize=["num_rows"])
def _rotate_unit_backward(
    grad, y, inverse_rms, cos, sin, grad_x, num_rows,
    H: tl.constexpr, K: tl.constexpr, PAIRS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows, at, other, angle, inside, is_turned, is_first = _places(
        tl.program_id(0).to(tl.int64) * ROWS, num_rows, H, K, PAIRS, ROWS, BLOCK
    )
    inverse = tl.load(inverse_rms + rows, mask=rows < num_rows, other=0.0)[:, None]
    rotated = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
    coming = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    # A rotation keeps products, so the part of the gradient along x is found on the rotated side.
    along = (tl.sum(coming * rotated, axis=1) / K)[:, None]
    value = (coming - rotated * along) * inverse
    rotated = tl.load(y + other, mask=is_turned, other=0.0).to(tl.float32)
    coming = tl.load(grad + other, mask=is_turned, other=0.0).to(tl.float32)
    partner = (coming - rotated * along) * inverse
    value = _turned(value, partner, cos, sin, angle, is_turned, is_first, True)
    tl.store(grad_x + at, value.to(grad_x.dtype.element_ty), mask=inside)


@triton.jit
def _as_cached(x, K: tl.constexpr, PAIRS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """``lowbit.round_entries`` of a tile: in E4M3 and back, but for what rotates."""
    group: tl.constexpr = _GROUP if BLOCK > _GROUP else BLOCK
    is_coded = (tl.arange(0, BLOCK) < K - 2 * PAIRS)[None, :]
    bits = tl.reshape(tl.where(is_coded, bits_of(x), 0), (ROWS * BLOCK // group, group))
    scale, stored = group_scales(bits, False)
    made = nearest_value(bits, scale[:, None], False) * factor_of(stored)[:, None]
    return tl.where(is_coded, tl.reshape(made, (ROWS, BLOCK)), x)


@triton.jit(do_not_specialize=["num_rows"])
def _rotate_normed(
    x, weight, cos, sin, y, inverse_rms, num_rows, eps, ROUNDS: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, PAIRS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows, at, other, angle, inside, is_turned, is_first = _places(
        tl.program_id(0).to(tl.int64) * ROWS, num_rows, H, K, PAIRS, ROWS, BLOCK
    )
    of_row = rows[:, None] * K
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    partner = tl.load(x + other, mask=is_turned, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(value * value, axis=1) / K + eps)
    value = value * inverse[:, None] * tl.load(weight + at - of_row, mask=inside, other=0.0).to(tl.float32)
    partner = partner * inverse[:, None] * tl.load(weight + other - of_row, mask=is_turned, other=0.0).to(tl.float32)
    # Rounded between the stages, as the operations one by one do.
    value = value.to(y.dtype.element_ty).to(tl.float32)
    partner = partner.to(y.dtype.element_ty).to(tl.float32)
    value = _turned(value, partner, cos, sin, angle, is_turned, is_first, False)
    if ROUNDS:
        value = _as_cached(value, K, PAIRS, ROWS, BLOCK)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=inside)
    tl.store(inverse_rms + rows, inverse, mask=rows < num_rows)


@triton.jit(do_not_specialize=["num_rows"])
def _rotate_normed_backward(
    grad, x, weight, inverse_rms, cos, sin, grad_x, sums, num_rows,
    H: tl.constexpr, K: tl.constexpr, PAIRS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ROWS_OF_A_SUM: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    channels = tl.arange(0, BLOCK)
    of_weight = tl.load(weight + channels, mask=channels < K, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, ROWS_OF_A_SUM, ROWS):
        rows, at, other, angle, inside, is_turned, is_first = _places(
            program * ROWS_OF_A_SUM + start, num_rows, H, K, PAIRS, ROWS, BLOCK
        )
        inverse = tl.load(inverse_rms + rows, mask=rows < num_rows, other=0.0)[:, None]
        normed = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * inverse
        coming = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        partner = tl.load(grad + other, mask=is_turned, other=0.0).to(tl.float32)
        coming = _turned(coming, partner, cos, sin, angle, is_turned, is_first, True)
        total += tl.sum(coming * normed, axis=0)
        coming = coming * of_weight
        # y = x r, dr/dx = -r^3 x / K: the part of the gradient along x is removed.
        along = (tl.sum(coming * normed, axis=1) / K)[:, None]
        value = (coming - normed * along) * inverse
        tl.store(grad_x + at, value.to(grad_x.dtype.element_ty), mask=inside)
    tl.store(sums + program * K + channels, total, mask=channels < K)
