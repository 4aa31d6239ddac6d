"""The iteration for many matrices side by side: three batched products a step, the sums inside them."""

from __future__ import annotations

import torch

from dsv4.ops.orthogonalize.reference import EPSILON


def orthogonalize(
    matrices: torch.Tensor, steps: tuple[tuple[float, float, float], ...], dtype: torch.dtype
) -> torch.Tensor:
    """See ``dsv4.ops.orthogonalize``."""
    x = matrices.unsqueeze(0).flatten(0, -3)  # [batch, rows, columns]
    is_tall = x.shape[1] > x.shape[2]
    if is_tall:
        x = x.mT
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    x = (x / (torch.linalg.matrix_norm(x, keepdim=True) + EPSILON)).to(dtype)
    for a, b, c in steps:
        gram = torch.bmm(x, x.mT)  # X X^T
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b X X^T + c (X X^T)^2
        x = torch.baddbmm(x, polynomial, x, beta=a)
    if is_tall:
        x = x.mT
    return x.to(matrices.dtype).reshape(matrices.shape)
