"""The specification of the experts: one token at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dsv4.ops.experts.store import ExpertStore, Matrices, needed, of_store


def swiglu(gate: torch.Tensor, up: torch.Tensor, limit: float) -> torch.Tensor:
    """See ``dsv4.ops.experts.swiglu``."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    g, v = gate.to(wide).clamp(max=limit), up.to(wide).clamp(-limit, limit)
    return (g * torch.sigmoid(g) * v).to(gate.dtype)


def experts(
    x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, routed: Matrices, limit: float
) -> torch.Tensor:
    """See ``dsv4.ops.experts``."""
    return _by_token(x, chosen, weights, routed.one, limit)


def experts_with_shared(
    x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, routed: Matrices, shared: Matrices, limit: float
) -> torch.Tensor:
    """See ``dsv4.ops.experts.experts_with_shared``."""
    return _join(experts(x, chosen, weights, routed, limit), x, shared, limit)


def stored_experts(
    x: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    store: ExpertStore,
    limit: float,
    shared: Matrices | None,
) -> torch.Tensor:
    """See ``dsv4.ops.experts.stored_experts``."""
    found = of_store(store, needed(chosen, store.sizes[0]), len(x))
    kept = {expert: Matrices(tuple(w.clone() for w in matrices.parts)) for expert, matrices in found}
    routed = _by_token(x, chosen, weights, kept.__getitem__, limit)
    return routed if shared is None else _join(routed, x, shared, limit)


def _by_token(
    x: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    matrices_of: Callable[[int], Matrices],
    limit: float,
) -> torch.Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    rows = []
    for t in range(x.shape[0]):
        total = x.new_zeros(x.shape[1], dtype=wide)
        for expert, weight in zip(chosen[t].tolist(), weights[t], strict=True):
            w1, w2, w3 = (w.to(x.dtype) for w in matrices_of(expert).parts)
            g, v = (w1 @ x[t]).to(wide).clamp(max=limit), (w3 @ x[t]).to(wide).clamp(-limit, limit)
            hidden = (g * torch.sigmoid(g) * v * weight).to(x.dtype)
            total = total + (w2 @ hidden).to(wide)
        rows.append(total)
    return torch.stack(rows) if rows else x.new_zeros(0, x.shape[1], dtype=wide)


def _join(routed: torch.Tensor, x: torch.Tensor, shared: Matrices, limit: float) -> torch.Tensor:
    w1, w2, w3 = (w.to(x.dtype) for w in shared.parts)
    return (routed + swiglu(x @ w1.T, x @ w3.T, limit) @ w2.T).to(x.dtype)
