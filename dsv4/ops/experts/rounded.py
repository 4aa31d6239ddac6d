"""Experts whose inputs are rounded as released, with a gradient: plain torch, expert by expert.

    y_e = w2 round(silu(min(w1 round(x), limit)) * clip(w3 round(x), -limit, limit) * routing weight)

round is to E4M3 in groups of 128, its gradient passes straight through. The weights come rounded already.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dsv4.ops.backend import Backend, resolve
from dsv4.ops.experts.store import Matrices
from dsv4.ops.lowbit import round_rows


def rounded_experts(
    x: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    routed: Matrices,
    limit: float,
    backend: Backend,
) -> torch.Tensor:
    """See ``dsv4.ops.experts.rounded_experts``."""
    rounding = "reference" if backend == "reference" else resolve("auto", x.device)
    rows = round_rows(x, backend=rounding)
    w1, w2, w3 = routed.parts
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in chosen.unique().tolist():
        token, choice = (chosen == expert).nonzero(as_tuple=True)
        own = rows[token]
        gate = F.linear(own, w1[expert]).float().clamp(max=limit)
        up = F.linear(own, w3[expert]).float().clamp(-limit, limit)
        hidden = (F.silu(gate) * up * weights[token, choice][:, None]).to(x.dtype)
        out = F.linear(round_rows(hidden, backend=rounding), w2[expert])
        total = total.index_add(0, token, out.float())
    return total
