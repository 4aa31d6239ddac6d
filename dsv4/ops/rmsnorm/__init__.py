"""RMS normalisation: y = x / sqrt(mean(x^2) + eps) * weight, mean over the last dimension.

Float32 inside, one rounding on the way out. ``weight`` None is the per-head query norm, which has none.
"""

from __future__ import annotations

import torch

from dsv4.ops.backend import Backend, pick
from dsv4.ops.compiled import compiled
from dsv4.ops.rmsnorm import native, portable, reference
from dsv4.ops.shapes import Shapes, check_floating


def rmsnorm(x: torch.Tensor, weight: torch.Tensor | None, eps: float, *, backend: Backend = "portable") -> torch.Tensor:
    """Normalise the last dimension of ``x``.

    x: [..., D] float; weight: [D] float or None; returns [..., D] in the dtype of x.
    """
    check_floating("x", x)
    if weight is not None:
        shapes = Shapes()
        shapes.check("x", x, "... D")
        shapes.check("weight", weight, "D")
    chosen = pick(
        backend,
        reference=reference.rmsnorm,
        portable=portable.rmsnorm,
        native=native.rmsnorm,
        compiled=compiled(reference.rmsnorm, channels=1),
        triton="rmsnorm.triton:rmsnorm",
    )
    return chosen(x, weight, eps)
