"""The affinity with torch's own softplus."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dsv4.ops.route.reference import LOWEST


def affinity(logits: torch.Tensor) -> torch.Tensor:
    """See ``dsv4.ops.route.affinity``."""
    return F.softplus(logits.clamp(min=LOWEST)).sqrt()
