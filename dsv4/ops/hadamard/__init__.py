"""The orthonormal Walsh-Hadamard transform of the last dimension, natural (Sylvester) order, no signs.

It spreads outliers over all channels before the indexer's queries and keys are rounded to FP4. It is its
own inverse and cancels in a dot product of two transformed vectors.
"""

from __future__ import annotations

import torch

from dsv4.ops.backend import Backend, pick
from dsv4.ops.hadamard import portable, reference


def hadamard(x: torch.Tensor, *, backend: Backend = "portable") -> torch.Tensor:
    """Transform x [..., J], J a power of two; returns the shape and dtype of x, rounded once."""
    width = x.shape[-1]
    if width & (width - 1) or width == 0:
        raise ValueError(f"x has {width} channels; expected a power of two")
    return pick(backend, reference=reference.hadamard, portable=portable.hadamard, triton="hadamard.triton:hadamard")(x)
