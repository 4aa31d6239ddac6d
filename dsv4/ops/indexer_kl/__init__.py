"""What the lightning indexer learns from: the attention it chooses for (report 2.3.1 and 4.2.2, DeepSeek-V3.2 2.1).

    teacher[t, c] = sum_h exp(scale * q[t, h] . x[c] - log_sum_exp[t, h]), divided by its sum over c
    student[t, c] = softmax over c of the index score (dsv4.ops.index)
    kl[t]         = sum_c teacher * log(teacher / student)

Both run over the entries the query sees: the picked ones, or an interval. The log-sum-exp is that of ``attend``,
window and sink included: a head that looks at the window says little about entries. A softmax over the entries alone
would give every head the same say. The teacher carries no gradient; the student's passes straight through the
rounding of its products. A query that sees no entry has a divergence of exactly 0 and no gradient.
"""

from __future__ import annotations

import torch

from dsv4.ops.attend import Entries
from dsv4.ops.backend import Backend, pick
from dsv4.ops.indexer_kl import portable, reference
from dsv4.ops.shapes import Shapes, check_integer


def indexer_kl(
    index_q: torch.Tensor,
    index_k: torch.Tensor,
    index_weights: torch.Tensor,
    q: torch.Tensor,
    entries: Entries,
    log_sum_exp: torch.Tensor,
    query_weights: torch.Tensor,
    *,
    scale: float,
    backend: Backend = "portable",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the loss sum_t query_weight[t] kl[t], each query's kl, and the kl of a uniform student.

    index_q: [B, T, I, J]; index_k: [B, C, J]; index_weights: [B, T, I]: the student, which alone gets gradients.
    q: [B, T, H, K], entries, scale and log_sum_exp [B, T, H]: what ``attend`` was given, and gave.
    query_weights: [B, T] float32. The loss is a float32 scalar, both kl are [B, T] float32 without gradient. A uniform
    student gives all entries that a query sees the same probability: 1 - kl / its kl is the share of the teacher's
    information that the indexer has captured.
    """
    shapes = Shapes()
    shapes.check("index_q", index_q, "B T I J")
    shapes.check("index_k", index_k, "B C J")
    shapes.check("index_weights", index_weights, "B T I")
    _check_teacher(shapes, q, entries, log_sum_exp)
    shapes.check("query_weights", query_weights, "B T")
    chosen = pick(
        backend,
        reference=reference.indexer_kl,
        portable=portable.indexer_kl,
        triton="indexer_kl.triton:indexer_kl",
    )
    teacher = (q.detach(), entries._replace(values=entries.values.detach()), log_sum_exp.detach())
    return chosen(index_q, index_k, index_weights, *teacher, query_weights, scale)


def recall(
    q: torch.Tensor,
    entries: Entries,
    log_sum_exp: torch.Tensor,
    picked: torch.Tensor,
    *,
    scale: float,
    backend: Backend = "portable",
) -> torch.Tensor:
    """Return the share of the teacher's P best entries that the indexer picked, [B, T] float32.

    NaN of queries with no more than P entries, which have nothing to choose. No gradient.
    q: [B, T, H, K]; entries: all a query could choose from, by an interval; log_sum_exp: [B, T, H], of attention
    over these or over the picked ones; picked: [B, T, P] int64, as ``dsv4.ops.index.select`` gives.
    """
    shapes = Shapes()
    _check_teacher(shapes, q, entries, log_sum_exp)
    if entries.picked is not None:
        raise ValueError("entries give picked; expected begin and end: recall is measured among all entries")
    shapes.check("picked", picked, "B T P")
    check_integer("picked", picked)
    chosen = pick(backend, reference=reference.recall, portable=portable.recall, triton="indexer_kl.triton:recall")
    with torch.no_grad():
        return chosen(q, entries, log_sum_exp, picked, scale)


def _check_teacher(shapes: Shapes, q: torch.Tensor, entries: Entries, log_sum_exp: torch.Tensor) -> None:
    shapes.check("q", q, "B T H K")
    shapes.check("entries.values", entries.values, "B C K")
    if (entries.picked is None) == (entries.begin is None) or (entries.begin is None) != (entries.end is None):
        raise ValueError("entries give picked and an interval, or neither; expected exactly one of them")
    for name, letters in (("picked", "B T P"), ("begin", "B T"), ("end", "B T")):
        tensor = getattr(entries, name)
        if tensor is not None:
            shapes.check(f"entries.{name}", tensor, letters)
            check_integer(f"entries.{name}", tensor)
    shapes.check("log_sum_exp", log_sum_exp, "B T H")
