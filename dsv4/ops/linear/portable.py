"""Linear maps by torch's matrix products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from dsv4.ops.lowbit import Packed, dequantise, round_rows

Weight = torch.Tensor | Packed


def linear(x: torch.Tensor, weight: Weight, wide: bool) -> torch.Tensor:
    """See ``dsv4.ops.linear.linear``."""
    if isinstance(weight, Packed):
        has_powers = weight.scales.dtype == torch.uint8  # values are exact in x's dtype
        compute = x.dtype if has_powers and not wide else torch.promote_types(x.dtype, torch.float32)
        y = F.linear(round_rows(x).to(compute), dequantise(weight, compute))
        return y if wide else y.to(x.dtype)
    return _WideLinear.apply(x, weight) if wide else F.linear(x, weight.to(x.dtype))


def linears(x: torch.Tensor, weights: Sequence[Weight], wide: Sequence[bool]) -> list[torch.Tensor]:
    """See ``dsv4.ops.linear.linears``."""
    return [linear(x, weight, is_wide) for weight, is_wide in zip(weights, wide, strict=True)]


def linear_groups(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """See ``dsv4.ops.linear.linear_groups``."""
    low = torch.bmm(x.transpose(0, 1), weight.to(x.dtype).transpose(1, 2))  # [G, M, N]
    return low.transpose(0, 1).flatten(1)


class _WideLinear(torch.autograd.Function):
    """Products of bfloat16 numbers are exact in float32, so the wide map loses nothing of them.

    The gradients, which are rounded to the dtype of x on their way out in any case, are multiplied in that dtype; no
    widened copy of x is kept.
    """

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.linear(x.to(wide), weight.to(wide))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        narrow = grad.to(x.dtype)
        grad_weight = narrow.flatten(0, -2).T @ x.flatten(0, -2)
        return narrow @ weight.to(x.dtype), grad_weight.to(weight.dtype)
