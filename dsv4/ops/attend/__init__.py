"""Attention of a query over its window and chosen compressed entries (report 2.3, equation 27).

Keys and values are the same vectors, one head of them for all H query heads. Window and entries share one
softmax, whose denominator also holds exp(sink) of the head; the sink has no value vector:

    out[t, h] = sum_j exp(s_j) x_j / (sum_j exp(s_j) + exp(sink_h)),    s_j = scale * q[t, h] . x_j

Query t of a row is token S - T + t of its raw key-value source: the source holds what came before this
call, then the call's own tokens. It sees the raw tokens from raw_begin[t], at most ``window`` of them and
itself the last, and compressed entries: the picked ones, or all of entry_begin[t] <= c < entry_end[t].
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from dsv4.ops.attend import portable, reference
from dsv4.ops.backend import Backend, pick
from dsv4.ops.shapes import Shapes, check_integer


class Entries(NamedTuple):
    """Compressed entries and which of them each query sees.

    values: [B, C, K]; picked: [B, T, P] int64, distinct for a query, -1 for none; or begin and end: [B, T]
    int64. Exactly one of ``picked`` and the interval is given.
    """

    values: torch.Tensor
    picked: torch.Tensor | None = None
    begin: torch.Tensor | None = None
    end: torch.Tensor | None = None


def attend(
    q: torch.Tensor,
    kv: torch.Tensor,
    sink: torch.Tensor,
    raw_begin: torch.Tensor,
    entries: Entries | None,
    *,
    window: int,
    scale: float,
    backend: Backend = "portable",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the attention output, [B, T, H, K] in the dtype of q, and its log-sum-exp, [B, T, H] float32.

    q: [B, T, H, K]; kv: [B, S, K], S >= T; sink: [H] float32; raw_begin: [B, T] int64.
    The log-sum-exp includes the sink and carries no gradient.
    """
    shapes = Shapes()
    shapes.check("q", q, "B T H K")
    shapes.check("kv", kv, "B S K")
    shapes.check("sink", sink, "H")
    shapes.check("raw_begin", raw_begin, "B T")
    check_integer("raw_begin", raw_begin)
    if kv.shape[1] < q.shape[1]:
        raise ValueError(f"kv has {kv.shape[1]} tokens; expected at least the {q.shape[1]} of q")
    if window < 1:
        raise ValueError(f"window is {window}; expected at least 1, the query itself")
    if entries is not None:
        _check_entries(shapes, entries)
    chosen = pick(backend, reference=reference.attend, portable=portable.attend, triton="attend.triton:attend")
    if entries is not None and 0 in (entries.values.shape[1], 1 if entries.picked is None else entries.picked.shape[2]):
        entries = None
    return chosen(q, kv, sink, raw_begin, entries, window, scale)


def _check_entries(shapes: Shapes, entries: Entries) -> None:
    shapes.check("entries.values", entries.values, "B C K")
    given = tuple(x is not None for x in (entries.picked, entries.begin, entries.end))
    if given not in ((True, False, False), (False, True, True)):
        raise ValueError("entries give picked and an interval, or neither; expected exactly one of them")
    for name in ("picked", "begin", "end"):
        tensor = getattr(entries, name)
        if tensor is not None:
            shapes.check(f"entries.{name}", tensor, "B T P" if name == "picked" else "B T")
            check_integer(f"entries.{name}", tensor)
