"""The specification of the loss."""

from __future__ import annotations

import torch


def cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, token_weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``dsv4.ops.cross_entropy``."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logits = hidden.to(wide) @ weight.to(wide).T  # [T, V]
    log_likelihood = logits.log_softmax(dim=-1).gather(-1, targets[:, None])[:, 0]
    return -(token_weights * log_likelihood).sum(), -log_likelihood.detach()
