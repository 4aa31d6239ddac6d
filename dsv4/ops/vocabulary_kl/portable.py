"""The divergence over slices of tokens, gradients formed in the same pass that forms both models' logits."""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from dsv4.ops.cross_entropy.portable import FEWEST_TOKENS, LOGITS_HELD


def vocabulary_kl(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    token_weights: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``dsv4.ops.vocabulary_kl``."""
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _VocabularyKL.apply(hidden, weight, teacher_hidden, teacher_weight, token_weights, needs_grad)


class _VocabularyKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, teacher_hidden, teacher_weight, token_weights, needs_grad):
        T, V = hidden.shape[0], weight.shape[0]
        wide = torch.promote_types(torch.promote_types(hidden.dtype, teacher_hidden.dtype), torch.float32)
        head, teacher_head = weight.to(wide), teacher_weight.to(wide)
        kl = hidden.new_empty(T, dtype=wide)
        grad_hidden, grad_weight = (torch.zeros_like(x) if needs_grad else x.new_empty(0) for x in (hidden, head))
        narrow = weight.to(hidden.dtype) if needs_grad else weight
        step = max(FEWEST_TOKENS, LOGITS_HELD // V // 2)  # both models' logits
        for t in range(0, T, step):
            now = slice(t, t + step)
            student = (hidden[now].to(wide) @ head.T).log_softmax(dim=-1)  # [t, V]
            teacher = (teacher_hidden[now].to(wide) @ teacher_head.T).log_softmax(dim=-1)
            shares = torch.sub(student, teacher, out=teacher)
            likelihood = student.exp_()
            kl[now] = shares.mul_(likelihood).sum(dim=-1)
            if needs_grad:
                shares.addcmul_(likelihood, kl[now, None], value=-1)
                grad_logits = shares.mul_(token_weights[now, None].to(wide)).to(hidden.dtype)
                grad_hidden[now] = grad_logits @ narrow
                grad_weight += grad_logits.T @ hidden[now]
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(kl)
        return torch.dot(token_weights.to(wide), kl), kl

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        grad_hidden, grad_weight = ctx.saved_tensors
        of_weight = (grad_weight * grad).to(ctx.weight_dtype)
        return grad_hidden * grad.to(grad_hidden.dtype), of_weight, None, None, None, None
