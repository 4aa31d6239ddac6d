"""The rotation, written once into a fresh copy; its gradient is the opposite rotation."""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool) -> torch.Tensor:
    """See ``dsv4.ops.rope.rotate``."""
    return _Rotate.apply(x, cos, -sin if inverse else sin)


def rotate_unit(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float) -> torch.Tensor:
    """See ``dsv4.ops.rope.rotate_unit``."""
    return _RotateUnit.apply(x, cos, sin, eps)


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return _turn_(x.clone(memory_format=torch.contiguous_format), cos, sin)


def _turn_(y: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Overwrite the rotary channels of y with the rotated ones."""
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


class _RotateUnit(torch.autograd.Function):
    """Keeps its output, which attention keeps anyway, instead of its input."""

    @staticmethod
    def forward(ctx, x, cos, sin, eps):
        wide = torch.promote_types(x.dtype, torch.float32)
        wide_x = x.to(wide)
        norm = torch.linalg.vector_norm(wide_x, dim=-1, keepdim=True)
        inverse_rms = torch.rsqrt(norm.square() / x.shape[-1] + eps)  # [B, T, H, 1]
        normed = (wide_x * inverse_rms).to(x.dtype)
        cos, sin = cos.to(wide), sin.to(wide)
        y = _turn_(normed, cos, sin)
        ctx.save_for_backward(y, inverse_rms, cos, sin)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        y, inverse_rms, cos, sin = ctx.saved_tensors
        # A rotation keeps products, so the part of the gradient along x is found on the rotated side.
        rotated, wide_grad = y.to(inverse_rms.dtype), grad.to(inverse_rms.dtype)
        along = torch.linalg.vecdot(wide_grad, rotated).unsqueeze(-1) / y.shape[-1]
        across = torch.addcmul(wide_grad, rotated, along, value=-1).mul_(inverse_rms)
        return _turn_(across, cos, -sin).to(grad.dtype), None, None, None
