"""The transform in log2(J) rounds of sums and differences."""

from __future__ import annotations

import torch


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """See ``dsv4.ops.hadamard``."""
    width = x.shape[-1]
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    half = 1
    while half < width:
        pairs = y.unflatten(-1, (width // (2 * half), 2, half))  # [..., J / 2h, 2, h]
        a, b = pairs.unbind(-2)
        y = torch.stack([a + b, a - b], dim=-2).flatten(-3)  # [..., J]
        half *= 2
    return (y * width**-0.5).to(x.dtype)
