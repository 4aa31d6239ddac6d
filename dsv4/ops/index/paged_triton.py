"""The indexer's choice over pages as Triton kernels: those of ``triton.py``, which find keys by the table.

The grid is that of the table's full width, in which a token's position says where its entries end: no number is read
back to the CPU.
"""

from __future__ import annotations

import torch

from dsv4.ops.index.triton import choose
from dsv4.ops.index.triton_scores import PAGE_ENTRIES, Queries, pages_of
from dsv4.ops.places import PAGE_TOKENS, Places
from dsv4.ops.rows import RowFormat


def select_paged(
    q: torch.Tensor,
    weights: torch.Tensor,
    pages: torch.Tensor,
    places: Places,
    num_picks: int,
    row_format: RowFormat,
) -> torch.Tensor:
    """See ``dsv4.ops.index.paged.select_paged``; q is float32, float16 or bfloat16."""
    picked = places.position.new_empty(len(q), num_picks)
    ratio = PAGE_TOKENS // PAGE_ENTRIES
    seen = places.slot, places.position, places.position
    queries = Queries(q.contiguous(), weights.contiguous(), *seen, num_tokens=1, ratio=ratio)
    choose(queries, pages_of(pages, places.table, row_format, q), picked)
    return picked
