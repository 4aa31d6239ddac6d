"""The feed-forward experts: clamped SwiGLU over the tokens routed to each (report 2.1 and 4.2.3).

    expert(x) = w2 . (silu(min(w1 x, limit)) * clip(w3 x, -limit, limit) * routing weight)

w1 is the gate, w3 the linear part, w2 the way back. The routing weight multiplies before w2, in float32.
"""

from __future__ import annotations

import torch

from dsv4.ops.backend import Backend, pick
from dsv4.ops.experts import native, portable, reference
from dsv4.ops.shapes import Shapes, check_integer


def swiglu(gate: torch.Tensor, up: torch.Tensor, limit: float, *, backend: Backend = "portable") -> torch.Tensor:
    """Return silu(min(gate, limit)) * clip(up, -limit, limit), computed in float32, in the dtype of gate.

    gate, up: [..., F].
    """
    if gate.shape != up.shape:
        raise ValueError(f"up has shape {list(up.shape)}; expected that of gate, {list(gate.shape)}")
    return pick(backend, reference=reference.swiglu, portable=portable.swiglu, native=native.swiglu)(gate, up, limit)


def experts(
    x: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    w3: torch.Tensor,
    limit: float,
    *,
    backend: Backend = "portable",
) -> torch.Tensor:
    """Return the weighted sum of each token's experts, [T, D] float32.

    x: [T, D]; chosen: [T, A] int64, distinct in a row; weights: [T, A] float32; w1, w3: [E, F, D];
    w2: [E, D, F], in any float dtype (cast to that of x). The caller adds the shared expert and rounds.
    """
    shapes = Shapes()
    shapes.check("x", x, "T D")
    shapes.check("chosen", chosen, "T A")
    shapes.check("weights", weights, "T A")
    shapes.check("w1", w1, "E F D")
    shapes.check("w3", w3, "E F D")
    shapes.check("w2", w2, "E D F")
    check_integer("chosen", chosen)
    chosen_implementation = pick(backend, reference=reference.experts, portable=portable.experts, native=native.experts)
    return chosen_implementation(x, chosen, weights, w1, w2, w3, limit)
