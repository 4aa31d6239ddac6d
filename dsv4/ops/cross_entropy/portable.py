"""The loss over slices of tokens, gradients formed in the same pass that forms the logits."""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

LOGITS_HELD = 1 << 21  # elements
FEWEST_TOKENS = 256  # a slice narrower than this wastes the matrix products


def cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, token_weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``dsv4.ops.cross_entropy``."""
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _CrossEntropy.apply(hidden, weight, targets, token_weights, needs_grad)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, token_weights, needs_grad):
        T, V = hidden.shape[0], weight.shape[0]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        head = weight.to(wide)
        nll = hidden.new_empty(T, dtype=wide)
        grad_hidden, grad_weight = (torch.zeros_like(x) if needs_grad else x.new_empty(0) for x in (hidden, head))
        narrow = weight.to(hidden.dtype) if needs_grad else weight
        step = max(FEWEST_TOKENS, LOGITS_HELD // V)
        for t in range(0, T, step):
            now = slice(t, t + step)
            log_likelihood = (hidden[now].to(wide) @ head.T).log_softmax(dim=-1)  # [t, V]
            target = targets[now, None]
            nll[now] = -log_likelihood.gather(-1, target)[:, 0]
            if needs_grad:
                factor = token_weights[now, None].to(wide)
                grad_logits = log_likelihood.exp_().mul_(factor).scatter_add_(-1, target, -factor).to(hidden.dtype)
                grad_hidden[now] = grad_logits @ narrow
                grad_weight += grad_logits.T @ hidden[now]
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(nll)
        return torch.dot(token_weights.to(wide), nll), nll

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad.to(grad_hidden.dtype), (grad_weight * grad).to(ctx.weight_dtype), None, None, None
