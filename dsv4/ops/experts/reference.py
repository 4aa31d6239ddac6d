"""The specification of the experts: one token at a time."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from dsv4.ops.experts.store import ExpertStore, Matrices, needed

ByExpert = torch.Tensor | Mapping[int, torch.Tensor]


def swiglu(gate: torch.Tensor, up: torch.Tensor, limit: float) -> torch.Tensor:
    """See ``dsv4.ops.experts.swiglu``."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    g, v = gate.to(wide).clamp(max=limit), up.to(wide).clamp(-limit, limit)
    return (g * torch.sigmoid(g) * v).to(gate.dtype)


def experts(
    x: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    w1: ByExpert,
    w2: ByExpert,
    w3: ByExpert,
    limit: float,
) -> torch.Tensor:
    """See ``dsv4.ops.experts``."""
    wide = torch.promote_types(x.dtype, torch.float32)
    rows = []
    for t in range(x.shape[0]):
        total = x.new_zeros(x.shape[1], dtype=wide)
        for expert, weight in zip(chosen[t].tolist(), weights[t], strict=True):
            gate, up = (w[expert].to(x.dtype) @ x[t] for w in (w1, w3))
            g, v = gate.to(wide).clamp(max=limit), up.to(wide).clamp(-limit, limit)
            hidden = (g * torch.sigmoid(g) * v * weight).to(x.dtype)
            total = total + (w2[expert].to(x.dtype) @ hidden).to(wide)
        rows.append(total)
    return torch.stack(rows) if rows else x.new_zeros(0, x.shape[1], dtype=wide)


def experts_with_shared(
    x: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    routed: tuple[ByExpert, ByExpert, ByExpert],
    shared: Matrices,
    limit: float,
) -> torch.Tensor:
    """See ``dsv4.ops.experts.experts_with_shared``."""
    w1, w2, w3 = (w.to(x.dtype) for w in shared)
    own = swiglu(x @ w1.T, x @ w3.T, limit) @ w2.T
    return (experts(x, chosen, weights, *routed, limit) + own).to(x.dtype)


def stored_experts(
    x: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    store: ExpertStore,
    limit: float,
    shared: Matrices | None,
) -> torch.Tensor:
    """See ``dsv4.ops.experts.stored_experts``."""
    w1: dict[int, torch.Tensor] = {}
    w2, w3 = dict(w1), dict(w1)
    for table in store.tables(needed(chosen, store.sizes[0]), len(x)):
        for expert, matrices in table.matrices.items():
            w1[expert], w2[expert], w3[expert] = (w.clone() for w in matrices)
    if shared is None:
        return experts(x, chosen, weights, w1, w2, w3, limit)
    return experts_with_shared(x, chosen, weights, (w1, w2, w3), shared, limit)
