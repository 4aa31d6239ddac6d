"""RMS normalisation that keeps only its input and one number a row for backward."""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable


def rmsnorm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """See ``dsv4.ops.rmsnorm``."""
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        wide = torch.promote_types(x.dtype, torch.float32)
        wide_x = x.to(wide)
        norm = torch.linalg.vector_norm(wide_x, dim=-1, keepdim=True)
        inverse_rms = torch.rsqrt(norm.square() / x.shape[-1] + eps)  # [..., 1]
        y = wide_x * inverse_rms
        if weight is not None:
            y.mul_(weight.to(wide))
        ctx.save_for_backward(x, weight, inverse_rms)
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, inverse_rms = ctx.saved_tensors
        return *gradients(grad, x, weight, inverse_rms, ctx.needs_input_grad[1]), None


def gradients(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    inverse_rms: torch.Tensor,
    is_weight_trained: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gradients of x and weight. inverse_rms: [..., 1] wide."""
    normed = x.to(inverse_rms.dtype) * inverse_rms  # [..., D] wide
    grad = grad.to(normed.dtype)
    grad_weight = None
    if weight is not None:
        if is_weight_trained:
            grad_weight = (normed * grad).reshape(-1, x.shape[-1]).sum(dim=0).to(weight.dtype)
        grad = grad * weight.to(normed.dtype)
    # y = x r, dr/dx = -r^3 x / D: the part of the gradient along x is removed.
    along = torch.linalg.vecdot(grad, normed).unsqueeze(-1) / x.shape[-1]
    grad_x = torch.addcmul(grad, normed, along, value=-1).mul_(inverse_rms)
    return grad_x.to(x.dtype), grad_weight
