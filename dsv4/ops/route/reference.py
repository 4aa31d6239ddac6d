"""The specification of the affinity."""

from __future__ import annotations

import torch

LOWEST = -80.0  # logits below count as this


def affinity(logits: torch.Tensor) -> torch.Tensor:
    """See ``dsv4.ops.route.affinity``. Softplus is the identity above 20, as in the released code."""
    logits = logits.clamp(min=LOWEST)
    softplus = torch.where(logits > 20, logits, torch.log1p(torch.exp(logits.clamp(max=20))))
    return softplus.sqrt()
