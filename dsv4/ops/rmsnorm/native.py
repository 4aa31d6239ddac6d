"""RMS normalisation on the CPU, forward as one C kernel (``native/norm.c``); backward is the portable one."""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from dsv4 import native
from dsv4.ops.rmsnorm import portable

FEW = 8  # rows that are not worth splitting over threads


def rmsnorm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """See ``dsv4.ops.rmsnorm``."""
    if not native.serves(x) or not (weight is None or native.serves(weight)):
        return portable.rmsnorm(x, weight, eps)
    if native.wants_gradient(x, weight):
        return _RMSNorm.apply(x, weight, eps)
    return _normalise(x, weight, eps)[0]


def _normalise(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The result, and the inverse RMS of each row, [..., 1] float32."""
    x, y = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    inverse_rms = torch.empty(*x.shape[:-1], 1)
    rows, D = inverse_rms.numel(), x.shape[-1]
    threads = torch.get_num_threads() if rows >= FEW else 1
    weight_is_bfloat16 = 0 if weight is None else native.is_bfloat16(weight)
    weight = None if weight is None else weight.contiguous()
    native.call(
        "dsv4_rmsnorm", rows, D, native.is_bfloat16(x), weight_is_bfloat16, threads, eps, x, weight, y, inverse_rms
    )
    return y, inverse_rms


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        y, inverse_rms = _normalise(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse_rms)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, inverse_rms = ctx.saved_tensors
        return *portable.gradients(grad, x, weight, inverse_rms, ctx.needs_input_grad[1]), None
