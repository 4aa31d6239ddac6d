"""SwiGLU on the CPU as one C kernel (``native/swiglu.c``), alone and inside the experts."""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from dsv4 import native
from dsv4.ops.experts import portable


def swiglu(gate: torch.Tensor, up: torch.Tensor, limit: float) -> torch.Tensor:
    """See ``dsv4.ops.experts.swiglu``."""
    if not native.serves(gate) or up.dtype != gate.dtype:
        return portable.swiglu(gate, up, limit)
    return _SwiGLU.apply(gate, up, limit)


def experts(
    x: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    w3: torch.Tensor,
    limit: float,
) -> torch.Tensor:
    """See ``dsv4.ops.experts``."""
    activation = _ACTIVATION if native.serves(x) else portable.ACTIVATION
    return portable.run(x, chosen, weights, w1, w2, w3, limit, activation)


def _activate(gate: torch.Tensor, up: torch.Tensor, weight: torch.Tensor | None, limit: float) -> torch.Tensor:
    gate, up, out = gate.contiguous(), up.contiguous(), torch.empty_like(gate, memory_format=torch.contiguous_format)
    native.call("dsv4_swiglu", *_sizes(gate), gate, up, weight, limit, out)
    return out


def _activate_backward(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, weight: torch.Tensor, limit: float
) -> portable.ActivationGrads:
    activated, grad_gate, grad_up = (torch.empty_like(gate) for _ in range(3))
    grads = portable.ActivationGrads(activated, grad_gate, grad_up, torch.empty_like(weight))
    native.call("dsv4_swiglu_backward", *_sizes(gate), gate, up, weight, limit, grad, *grads)
    return grads


def _sizes(gate: torch.Tensor) -> tuple[int, ...]:
    F = gate.shape[-1]
    return gate.numel() // F, F, native.is_bfloat16(gate), torch.get_num_threads()


_ACTIVATION = portable.Activation(_activate, _activate_backward)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, limit):
        ctx.save_for_backward(gate, up)
        ctx.limit = limit
        return _activate(gate, up, None, limit)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gate, up = (x.contiguous() for x in ctx.saved_tensors)
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        native.call(
            "dsv4_swiglu_backward", *_sizes(gate), gate, up, None, ctx.limit,
            grad.to(gate.dtype).contiguous(), None, grad_gate, grad_up, None,
        )  # fmt: skip
        return grad_gate, grad_up, None
