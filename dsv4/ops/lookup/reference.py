"""The specification of the lookup: row by row."""

from __future__ import annotations

import torch


def lookup(table: torch.Tensor, ids: torch.Tensor, copies: int | None) -> torch.Tensor:
    """See ``dsv4.ops.lookup.lookup``."""
    rows = [table[i] if copies is None else table[i].expand(copies, -1) for i in ids.flatten().tolist()]
    shape = (*ids.shape, table.shape[1]) if copies is None else (*ids.shape, copies, table.shape[1])
    return torch.stack(rows).view(shape) if rows else table.new_empty(shape)
