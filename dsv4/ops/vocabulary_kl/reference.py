"""The specification of the divergence."""

from __future__ import annotations

import torch


def vocabulary_kl(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    token_weights: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``dsv4.ops.vocabulary_kl``."""
    student, teacher = _log_likelihoods(hidden, weight), _log_likelihoods(teacher_hidden, teacher_weight)
    kl = (student.exp() * (student - teacher)).sum(dim=-1)
    return (token_weights * kl).sum(), kl.detach()


def _log_likelihoods(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return (hidden.to(wide) @ weight.to(wide).T).log_softmax(dim=-1)  # [T, V]
