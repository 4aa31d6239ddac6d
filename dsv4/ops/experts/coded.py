"""Experts in codes by linear maps of codes, expert by expert: what rounds where is the released model's rule.

The input of every map is rounded to E4M3 in groups of 128 (``dsv4.ops.linear``), a hidden row after its routing weight.
"""

from __future__ import annotations

import torch

from dsv4.ops.backend import Backend
from dsv4.ops.linear import linear
from dsv4.ops.lowbit import Packed

PackedMatrices = tuple[Packed, Packed, Packed]  # w1, w2 and w3


def experts_with_shared(
    x: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    routed: PackedMatrices,
    shared: PackedMatrices,
    limit: float,
    backend: Backend,
) -> torch.Tensor:
    """See ``dsv4.ops.experts.experts_with_shared``; without a gradient."""
    rows = x.new_zeros(*chosen.shape, x.shape[1])  # [T, A, D]
    for expert in chosen.unique().tolist():
        token, choice = (chosen == expert).nonzero(as_tuple=True)
        own = tuple(w.one(expert) for w in routed)
        rows[token, choice] = _expert(x[token], weights[token, choice], own, limit, backend)
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for of_choice in rows.unbind(1):
        total += of_choice
    ones = torch.ones(len(x), device=x.device)
    return (total + _expert(x, ones, shared, limit, backend)).to(x.dtype)


def _expert(
    x: torch.Tensor, weights: torch.Tensor, matrices: tuple[Packed, ...], limit: float, backend: Backend
) -> torch.Tensor:
    """One expert of all rows of x [n, D], with their routing weights [n]: [n, D] in the dtype of x."""
    w1, w2, w3 = matrices
    gate = linear(x, w1, backend=backend).float().clamp(max=limit)
    up = linear(x, w3, backend=backend).float().clamp(-limit, limit)
    hidden = gate * gate.sigmoid() * up * weights[:, None]
    return linear(hidden.to(x.dtype), w2, backend=backend)
