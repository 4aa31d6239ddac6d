"""The rotation, written once into a fresh copy; its gradient is the opposite rotation."""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """See ``dsv4.ops.rope.rotate``."""
    return _Rotate.apply(x, cos, sin)


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    y = x.clone(memory_format=torch.contiguous_format)
    tail = y[..., -2 * cos.shape[-1] :].unflatten(-1, (-1, 2))  # [..., R / 2, 2], a view of y
    a, b = tail[..., 0].to(cos.dtype, copy=True), tail[..., 1].to(cos.dtype, copy=True)
    tail[..., 0] = (a * cos).addcmul_(b, sin, value=-1)
    tail[..., 1] = (a * sin).addcmul_(b, cos)
    return y


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        wide = torch.promote_types(x.dtype, cos.dtype)
        cos, sin = cos.to(wide), sin.to(wide)
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, -sin), None, None
