"""The specification of the iteration: one matrix at a time."""

from __future__ import annotations

import torch

# In float32 the squares of numbers below 1e-22 vanish, and a norm may be 0 where a matrix is not. Divided by this, a
# matrix of such numbers still has a norm below 1, where the iteration is stable.
EPSILON = 1e-15


def orthogonalize(
    matrices: torch.Tensor, steps: tuple[tuple[float, float, float], ...], dtype: torch.dtype
) -> torch.Tensor:
    """See ``dsv4.ops.orthogonalize``."""
    flat = matrices.unsqueeze(0).flatten(0, -3)  # [batch, rows, columns]
    result = torch.empty_like(flat)
    for i, matrix in enumerate(flat):
        result[i] = _orthogonalize_one(matrix, steps, dtype)
    return result.reshape(matrices.shape)


def _orthogonalize_one(
    matrix: torch.Tensor, steps: tuple[tuple[float, float, float], ...], dtype: torch.dtype
) -> torch.Tensor:
    if matrix.shape[0] > matrix.shape[1]:
        return _orthogonalize_one(matrix.T, steps, dtype).T  # X X^T is then the smaller of the two products
    wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    x = (wide / (wide.square().sum().sqrt() + EPSILON)).to(dtype)
    for a, b, c in steps:
        gram = x @ x.T
        x = a * x + b * gram @ x + c * gram @ gram @ x
    return x
