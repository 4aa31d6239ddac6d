"""Experts in codes by linear maps of codes, expert by expert: what rounds where is the released model's rule.

The input of every map is rounded to E4M3 in groups of 128 (``dsv4.ops.linear``), a hidden row after its routing weight.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from dsv4.ops.backend import Backend
from dsv4.ops.experts.store import ExpertStore, Matrices, needed, of_store
from dsv4.ops.linear import linear


def experts_with_shared(
    x: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    routed: Matrices,
    shared: Matrices,
    limit: float,
    backend: Backend,
) -> torch.Tensor:
    """See ``dsv4.ops.experts.experts_with_shared``; without a gradient."""
    found = ((expert, routed.one(expert)) for expert in chosen.unique().tolist())
    return _run(x, chosen, weights, found, shared, limit, backend)


def stored_experts(
    x: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    store: ExpertStore,
    limit: float,
    shared: Matrices | None,
    backend: Backend,
) -> torch.Tensor:
    """See ``dsv4.ops.experts.stored_experts``."""
    found = of_store(store, needed(chosen, store.sizes[0]), len(x))
    return _run(x, chosen, weights, found, shared, limit, backend)


def _run(
    x: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    routed: Iterable[tuple[int, Matrices]],
    shared: Matrices | None,
    limit: float,
    backend: Backend,
) -> torch.Tensor:
    """Run experts one after another; routed: each that is chosen, once."""
    rows = x.new_zeros(*chosen.shape, x.shape[1])  # [T, A, D]
    for expert, matrices in routed:
        token, choice = (chosen == expert).nonzero(as_tuple=True)
        rows[token, choice] = _expert(x[token], weights[token, choice], matrices, limit, backend)
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for of_choice in rows.unbind(1):
        total += of_choice
    if shared is None:
        return total
    ones = torch.ones(len(x), device=x.device)
    return (total + _expert(x, ones, shared, limit, backend)).to(x.dtype)


def _expert(x: torch.Tensor, weights: torch.Tensor, of: Matrices, limit: float, backend: Backend) -> torch.Tensor:
    """One expert of all rows of x [n, D], with their routing weights [n]: [n, D] in the dtype of x."""
    w1, w2, w3 = of.weights
    gate = linear(x, w1, backend=backend).float().clamp(max=limit)
    up = linear(x, w3, backend=backend).float().clamp(-limit, limit)
    hidden = gate * gate.sigmoid() * up * weights[:, None]
    return linear(hidden.to(x.dtype), w2, backend=backend)
