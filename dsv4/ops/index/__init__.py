"""The lightning indexer: which compressed entries a query attends to (report 2.3.1, equations 16 and 17).

    score[t, c] = sum_i weight[t, i] * relu(q[t, i] . k[c])

A query sees the entries entry_begin[t] <= c < entry_end[t] (the causal rule, and inside one document) and
keeps the ``top_k`` best of them. Equal scores are resolved towards the smaller c, so that the choice
does not depend on how a sequence was cut into calls. Products are rounded to the dtype of q, as the released
code keeps them, and summed over heads in float32.
"""

from __future__ import annotations

import torch

from dsv4.ops.backend import Backend, pick
from dsv4.ops.index import portable, reference
from dsv4.ops.shapes import Shapes, check_integer


def select(
    q: torch.Tensor,
    k: torch.Tensor,
    weights: torch.Tensor,
    entry_begin: torch.Tensor,
    entry_end: torch.Tensor,
    top_k: int,
    *,
    backend: Backend = "portable",
) -> torch.Tensor:
    """Return the chosen entries, [B, T, P] int64 ascending, with -1 after the last one.

    q: [B, T, I, J]; k: [B, C, J]; weights: [B, T, I]; entry_begin, entry_end: [B, T] int64.
    P = min(top_k, C). No gradient passes through the choice.
    """
    shapes = _check(q, k, weights)
    shapes.check("entry_begin", entry_begin, "B T")
    shapes.check("entry_end", entry_end, "B T")
    check_integer("entry_begin", entry_begin)
    check_integer("entry_end", entry_end)
    if top_k < 1:
        raise ValueError(f"top_k is {top_k}; expected at least 1")
    chosen = pick(backend, reference=reference.select, portable=portable.select, triton="index.triton:select")
    with torch.no_grad():
        return chosen(q, k, weights, entry_begin, entry_end, min(top_k, k.shape[1]))


def score(
    q: torch.Tensor, k: torch.Tensor, weights: torch.Tensor, picked: torch.Tensor, *, backend: Backend = "portable"
) -> torch.Tensor:
    """Return the scores of picked entries, [B, T, P] float32, -inf where picked is -1. Differentiable.

    q: [B, T, I, J]; k: [B, C, J]; weights: [B, T, I]; picked: [B, T, P] int64.
    """
    shapes = _check(q, k, weights)
    shapes.check("picked", picked, "B T P")
    check_integer("picked", picked)
    chosen = pick(backend, reference=reference.score, portable=portable.score, triton="index.triton:score")
    return chosen(q, k, weights, picked)


def _check(q: torch.Tensor, k: torch.Tensor, weights: torch.Tensor) -> Shapes:
    shapes = Shapes()
    shapes.check("q", q, "B T I J")
    shapes.check("k", k, "B C J")
    shapes.check("weights", weights, "B T I")
    return shapes
