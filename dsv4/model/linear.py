"""The one linear map: its weight is cast to the dtype of the activations here and nowhere else."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable


class Linear(nn.Module):
    """y = x W^T, no bias. weight: [out, in]; x: [..., in]; computes and returns in the dtype of x."""

    def __init__(self, num_inputs: int, num_outputs: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_outputs, num_inputs, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype))

    def wide(self, x: torch.Tensor) -> torch.Tensor:
        """The same map with a float32 result."""
        return wide_linear(x, self.weight)


def wide_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x W^T multiplied and returned in float32, where the released code widens its inputs: router and compressors.

    Products of bfloat16 numbers are exact in float32, so this loses nothing of them. The gradients, which are rounded
    to the dtype of x on their way out in any case, are multiplied in that dtype; no widened copy of x is kept.
    """
    return _WideLinear.apply(x, weight)


class _WideLinear(torch.autograd.Function):
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


class Norm(nn.Module):
    """The weight of an RMS normalisation, [D]."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, dtype=dtype))
