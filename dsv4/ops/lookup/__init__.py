"""Rows of a table by number: the embedding of tokens, and the experts that a hash layer has for them."""

from __future__ import annotations

import torch

from dsv4 import native as kernels
from dsv4.ops.backend import Backend, pick
from dsv4.ops.lookup import native, portable, reference
from dsv4.ops.shapes import Shapes


def lookup(
    table: torch.Tensor, ids: torch.Tensor, copies: int | None = None, *, backend: Backend = "portable"
) -> torch.Tensor:
    """Return ``table[ids]``, [..., D] in the dtype of the table, or each row ``copies`` times, [..., copies, D].

    table: [V, D] of any dtype; ids: [...] integers, 0 <= id < V, which is not checked. The gradient of the table is
    dense.
    """
    Shapes().check("table", table, "V D")
    if ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"ids has dtype {ids.dtype}; expected torch.int32 or torch.int64")
    if copies is not None and copies < 1:
        raise ValueError(f"copies is {copies}; expected at least 1, or None")
    with_kernel = native.lookup if table.device.type == "cpu" and not kernels.wants_gradient(table) else None
    run = pick(backend, reference=reference.lookup, portable=portable.lookup, native=with_kernel)
    return run(table, ids, copies)
