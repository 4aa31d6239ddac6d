"""Orthogonalisation of matrices: the Newton-Schulz iteration inside Muon (report 2.4, equation 28).

For M = U S V^T the result is nearly U V^T: the singular vectors stay, the singular values go to 1.

    X <- M / (|M|_F + epsilon)                       so that no singular value exceeds 1
    X <- a X + b (X X^T) X + c (X X^T)^2 X           once for each (a, b, c) of ``steps``

A singular value s moves by s <- a s + b s^3 + c s^5. In exact arithmetic the first eight steps of HYBRID lift one of
at least 4e-5 of the norm into 0.68 to 1.21, and its last two bring it to 1.000 to 1.003. What is smaller only grows,
79,000 times and less, and a zero matrix stays zero.
"""

from __future__ import annotations

import torch

from dsv4.ops.backend import Backend, pick
from dsv4.ops.orthogonalize import portable, reference
from dsv4.ops.shapes import check_floating

Steps = tuple[tuple[float, float, float], ...]
"""The coefficients (a, b, c) of each step."""

HYBRID: Steps = ((3.4445, -4.7750, 2.0315),) * 8 + ((2.0, -1.5, 0.5),) * 2
"""The report's ten steps: eight that lift small singular values fast, two that settle all of them at 1."""


def orthogonalize(
    matrices: torch.Tensor, *, dtype: torch.dtype, steps: Steps = HYBRID, backend: Backend = "portable"
) -> torch.Tensor:
    """Orthogonalise each matrix of [..., rows, columns] on its own.

    matrices: float; dtype: of the products, bfloat16 in the report (3.5.1). The norm is taken in float32 or wider.
    Returns the shape and dtype of ``matrices``. Epsilon is 1e-15: the result does not depend on the scale of a
    matrix whose norm is well above that.
    """
    check_floating("matrices", matrices)
    if matrices.dim() < 2:
        raise ValueError(f"matrices has shape {list(matrices.shape)}; expected [..., rows, columns]")
    chosen = pick(
        backend,
        reference=reference.orthogonalize,
        portable=portable.orthogonalize,
        triton="orthogonalize.triton:orthogonalize",
    )
    return chosen(matrices, steps, dtype)
