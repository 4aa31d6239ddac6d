"""The indexer's choice over pages as one C kernel (``native/index.c``)."""

from __future__ import annotations

import torch

from dsv4 import native
from dsv4.ops.places import Places
from dsv4.ops.rows import RowFormat
from dsv4.ops.rows.native import FORMATS


def serves(q: torch.Tensor, weights: torch.Tensor) -> bool:
    """Say whether the kernel takes these: on the CPU, float32 or bfloat16."""
    return native.serves(q) and native.serves(weights)


def select_paged(
    q: torch.Tensor,
    weights: torch.Tensor,
    pages: torch.Tensor,
    places: Places,
    num_picks: int,
    row_format: RowFormat,
) -> torch.Tensor:
    """See ``dsv4.ops.index.paged.select_paged``."""
    picked = torch.empty(len(q), num_picks, dtype=torch.int32)
    native.call(
        "dsv4_select_paged", *q.shape, num_picks, places.table.shape[1], FORMATS[row_format], native.is_bfloat16(q),
        native.is_bfloat16(weights), torch.get_num_threads(), q.contiguous(), weights.contiguous(), pages,
        places.slot, places.position, places.first, places.table, picked,
    )  # fmt: skip
    return picked
