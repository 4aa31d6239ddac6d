"""The rotation on the CPU as one C kernel (``native/rope.c``); the gradient of a rotation is the opposite one."""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from dsv4 import native
from dsv4.ops.rope import portable

VERY_SMALL = 64  # fewer rows than this are not worth splitting over threads


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool) -> torch.Tensor:
    """See ``dsv4.ops.rope.rotate``."""
    if not _serves(x, cos):
        return portable.rotate(x, cos, sin, inverse)
    sign = -1.0 if inverse else 1.0
    if not native.wants_gradient(x):
        return _turn(x, cos.contiguous(), sin.contiguous(), sign)
    return _Rotate.apply(x, cos, sin, sign)


def rotate_unit(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float) -> torch.Tensor:
    """See ``dsv4.ops.rope.rotate_unit``."""
    if not _serves(x, cos):
        return portable.rotate_unit(x, cos, sin, eps)
    if not native.wants_gradient(x):
        return _turn_unit(x.contiguous(), cos.contiguous(), sin.contiguous(), eps)[0]
    return _RotateUnit.apply(x, cos, sin, eps)


def angles(positions: torch.Tensor, frequency: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``dsv4.ops.rope.angles``."""
    cos, sin = (torch.empty(*positions.shape, len(frequency)) for _ in range(2))
    n, pairs, threads = positions.numel(), len(frequency), _threads(positions.numel())
    native.call("dsv4_angles", n, pairs, threads, positions.to(torch.int32).contiguous(), frequency, cos, sin)
    return cos, sin


def _serves(x: torch.Tensor, cos: torch.Tensor) -> bool:
    return native.serves(x) and cos.dtype == torch.float32


def _sizes(x: torch.Tensor, cos: torch.Tensor) -> tuple[int, ...]:
    """Rows, channels, pairs, heads a token, dtype and threads."""
    heads = x.shape[2] if x.dim() == 4 else 1
    rows = x.numel() // x.shape[-1]
    return rows, x.shape[-1], cos.shape[-1], heads, native.is_bfloat16(x), _threads(rows)


def _threads(rows: int) -> int:
    return torch.get_num_threads() if rows >= VERY_SMALL else 1


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: float) -> torch.Tensor:
    x, y = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    native.call("dsv4_rotate", *_sizes(x, cos), sign, x, cos, sin, y)
    return y


def _turn_unit(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    y, inverse_rms = torch.empty_like(x), torch.empty(x.shape[:-1], dtype=torch.float32)
    native.call("dsv4_rotate_unit", *_sizes(x, cos), eps, x, cos, sin, y, inverse_rms)
    return y, inverse_rms


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin, sign):
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        ctx.sign = sign
        return _turn(x, cos, sin, sign)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, sin, -ctx.sign), None, None, None


class _RotateUnit(torch.autograd.Function):
    """Keeps its output, which attention keeps anyway, instead of its input."""

    @staticmethod
    def forward(ctx, x, cos, sin, eps):
        x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
        y, inverse_rms = _turn_unit(x, cos, sin, eps)
        ctx.save_for_backward(y, inverse_rms, cos, sin)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        y, inverse_rms, cos, sin = ctx.saved_tensors
        grad, grad_x = grad.contiguous(), torch.empty_like(y)
        native.call("dsv4_rotate_unit_backward", *_sizes(y, cos), y, inverse_rms, cos, sin, grad, grad_x)
        return grad_x, None, None, None
