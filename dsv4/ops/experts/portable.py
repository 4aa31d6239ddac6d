"""Experts over tokens grouped by expert: one matrix product an expert and weight, nothing padded."""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable


def swiglu(gate: torch.Tensor, up: torch.Tensor, limit: float) -> torch.Tensor:
    """See ``dsv4.ops.experts.swiglu``."""
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
    slot = chosen.flatten().argsort(stable=True)  # [T * A]: slots t * A + a, grouped by expert
    counts = torch.bincount(chosen.flatten(), minlength=w1.shape[0]).tolist()
    return _Experts.apply(x, weights, w1, w2, w3, slot, counts, limit)


def _activate(gate: torch.Tensor, up: torch.Tensor, limit: float) -> torch.Tensor:
    """The clamped SwiGLU in at least float32."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    clipped = up.to(wide).clamp(-limit, limit)
    return torch.nn.functional.silu(gate.to(wide).clamp(max=limit)).mul_(clipped)


def _activate_backward(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, limit: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of gate and up; nothing passes where the clamp holds."""
    wide = grad.dtype
    g, v = gate.to(wide).clamp(max=limit), up.to(wide).clamp(-limit, limit)
    sigmoid = torch.sigmoid(g)
    silu = g * sigmoid
    grad_up = grad * silu
    grad_gate = silu.mul_(1 - sigmoid).add_(sigmoid).mul_(grad).mul_(v)  # silu' = s + g s (1 - s)
    grad_gate.masked_fill_(gate > limit, 0)
    grad_up.masked_fill_(up.abs() > limit, 0)
    return grad_gate.to(gate.dtype), grad_up.to(up.dtype)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, limit):
        ctx.save_for_backward(gate, up)
        ctx.limit = limit
        return _activate(gate, up, limit).to(gate.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        wide = torch.promote_types(gate.dtype, torch.float32)
        return *_activate_backward(grad.to(wide), gate, up, ctx.limit), None


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weights, w1, w2, w3, slot, counts, limit):
        wide = torch.promote_types(x.dtype, torch.float32)
        token = slot // weights.shape[1] if weights.shape[1] else slot  # [T * A]
        weight = weights.flatten()[slot, None].to(wide)  # [T * A, 1]
        gate, up = (x.new_empty(len(slot), w1.shape[1]) for _ in range(2))  # [T * A, F]
        out = torch.zeros_like(x, dtype=wide)
        for expert, now in _spans(counts):
            rows = x[token[now]]
            torch.mm(rows, w1[expert].to(x.dtype).T, out=gate[now])
            torch.mm(rows, w3[expert].to(x.dtype).T, out=up[now])
            hidden = _activate(gate[now], up[now], limit).mul_(weight[now]).to(x.dtype)
            out.index_add_(0, token[now], (hidden @ w2[expert].to(x.dtype).T).to(wide))
        ctx.save_for_backward(x, weights, w1, w2, w3, slot, gate, up)
        ctx.counts, ctx.limit = counts, limit
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weights, w1, w2, w3, slot, gate, up = ctx.saved_tensors
        wide = grad.dtype
        token = slot // weights.shape[1]
        weight = weights.flatten()[slot, None].to(wide)
        grad_x = torch.zeros_like(grad)
        grad_weight = grad.new_empty(len(slot))
        grad_w1, grad_w2, grad_w3 = (torch.zeros_like(w) for w in (w1, w2, w3))
        narrow = grad.to(x.dtype)
        for expert, now in _spans(ctx.counts):
            rows, grad_rows = x[token[now]], narrow[token[now]]
            activated = _activate(gate[now], up[now], ctx.limit)  # [n, F] wide
            grad_hidden = (grad_rows @ w2[expert].to(x.dtype)).to(wide)
            grad_weight[now] = torch.linalg.vecdot(grad_hidden, activated)
            hidden = activated.mul_(weight[now]).to(x.dtype)
            grad_w2[expert] = grad_rows.T @ hidden
            grad_gate, grad_up = _activate_backward(grad_hidden.mul_(weight[now]), gate[now], up[now], ctx.limit)
            grad_w1[expert] = grad_gate.T @ rows
            grad_w3[expert] = grad_up.T @ rows
            grad_rows = torch.mm(grad_gate, w1[expert].to(x.dtype)).addmm_(grad_up, w3[expert].to(x.dtype))
            grad_x.index_add_(0, token[now], grad_rows.to(wide))
        grad_weights = torch.empty_like(grad_weight).index_copy_(0, slot, grad_weight)
        grad_weights = grad_weights.view(weights.shape).to(weights.dtype)
        return grad_x.to(x.dtype), grad_weights, grad_w1, grad_w2, grad_w3, None, None, None


def _spans(counts: list[int]) -> list[tuple[int, slice]]:
    """The experts that have tokens, each with its slice of the grouped slots."""
    spans, start = [], 0
    for expert, count in enumerate(counts):
        if count:
            spans.append((expert, slice(start, start + count)))
        start += count
    return spans
