"""The clamped SwiGLU and its gradient as one kernel each, and as functions of the experts' kernels."""

# Kernels are a language of their own, in which a constexpr is a number.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from dsv4.ops.experts import portable
from dsv4.ops.linear.triton_product import DTYPES

ELEMENTS, WARPS = 1024, 4  # of a program: a thread loads 16 bytes of bfloat16 at a time


def swiglu(gate: torch.Tensor, up: torch.Tensor, limit: float) -> torch.Tensor:
    """See ``dsv4.ops.experts.swiglu``."""
    if gate.dtype not in DTYPES or up.dtype not in DTYPES:
        return portable.swiglu(gate, up, limit)
    return _SwiGLU.apply(gate, up, limit)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, limit):
        gate, up = gate.contiguous(), up.contiguous()
        out = torch.empty_like(gate)
        if count := gate.numel():
            _kernel[(triton.cdiv(count, ELEMENTS),)](gate, up, out, limit, count, ELEMENTS, num_warps=WARPS)
        ctx.save_for_backward(gate, up)
        ctx.limit = limit
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        if count := gate.numel():
            _backward_kernel[(triton.cdiv(count, ELEMENTS),)](
                grad.contiguous(), gate, up, grad_gate, grad_up, ctx.limit, count, ELEMENTS, num_warps=WARPS
            )
        return grad_gate, grad_up, None


@triton.jit
def _sigmoid(x):
    """By the exponential that does not overflow."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x < 0, small, 1.0) / (1 + small)


@triton.jit
def activation(gate, up, limit):
    """silu(min(gate, limit)) * clip(up, -limit, limit), all float32. NaN stays NaN, where a minimum would drop it."""
    g = tl.where(gate > limit, limit, gate)
    v = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    return g * _sigmoid(g) * v


@triton.jit
def activation_backward(grad, gate, up, limit):
    """The activation, and of its gradient those of gate and up: nothing passes beyond a limit, all passes at it."""
    g = tl.where(gate > limit, limit, gate)
    v = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    sigmoid = _sigmoid(g)
    silu = g * sigmoid
    grad_gate = tl.where(gate > limit, 0.0, grad * v * sigmoid * (1 + g * (1 - sigmoid)))
    grad_up = tl.where((up > limit) | (up < -limit), 0.0, grad * silu)
    return silu * v, grad_gate, grad_up


@triton.jit
def _kernel(gate, up, out, limit, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_in = at < count
    g = tl.load(gate + at, mask=is_in, other=0.0).to(tl.float32)
    v = tl.load(up + at, mask=is_in, other=0.0).to(tl.float32)
    tl.store(out + at, activation(g, v, limit).to(out.dtype.element_ty), mask=is_in)


@triton.jit
def _backward_kernel(grad, gate, up, grad_gate, grad_up, limit, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_in = at < count
    of = tl.load(grad + at, mask=is_in, other=0.0).to(tl.float32)
    g = tl.load(gate + at, mask=is_in, other=0.0).to(tl.float32)
    v = tl.load(up + at, mask=is_in, other=0.0).to(tl.float32)
    _, of_gate, of_up = activation_backward(of, g, v, limit)
    tl.store(grad_gate + at, of_gate.to(grad_gate.dtype.element_ty), mask=is_in)
    tl.store(grad_up + at, of_up.to(grad_up.dtype.element_ty), mask=is_in)
