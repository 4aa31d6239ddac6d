"""The specification of the transform: a product with the matrix."""

from __future__ import annotations

import torch


def matrix(width: int) -> torch.Tensor:
    """Return the [width, width] matrix of +1 and -1: H(2n) = [[H, H], [H, -H]]."""
    h = torch.ones(1, 1)
    while h.shape[0] < width:
        h = torch.cat([torch.cat([h, h], dim=1), torch.cat([h, -h], dim=1)], dim=0)
    return h


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """See ``dsv4.ops.hadamard``."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide @ matrix(x.shape[-1]).to(wide) * x.shape[-1] ** -0.5).to(x.dtype)
