"""Compression into pages as one C kernel (``native/compress.c``)."""

from __future__ import annotations

import torch

from dsv4 import native
from dsv4.ops.places import Places
from dsv4.ops.rows import RowFormat
from dsv4.ops.rows.native import FORMATS


def serves(kv: torch.Tensor, norm_weight: torch.Tensor, dtype: torch.dtype) -> bool:
    """Say whether the kernel takes these: on the CPU, weight and activations in float32 or bfloat16."""
    return native.serves(kv) and native.serves(norm_weight) and dtype in (torch.float32, torch.bfloat16)


def compress_paged_(
    kv: torch.Tensor,
    gate: torch.Tensor,
    position_bias: torch.Tensor,
    norm_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    tail_kv: torch.Tensor,
    tail_gate: torch.Tensor,
    pages: torch.Tensor,
    places: Places,
    overlap: bool,
    eps: float,
    row_format: RowFormat,
    is_index: bool,
    rounds: bool,
    dtype: torch.dtype,
) -> None:
    """See ``dsv4.ops.compress.paged.compress_paged_``."""
    m = position_bias.shape[0]
    native.call(
        "dsv4_compress_paged", len(kv), len(cos), kv.shape[1], m, tail_kv.shape[1], cos.shape[1],
        places.table.shape[1], overlap, FORMATS[row_format], is_index, rounds, dtype == torch.bfloat16,
        native.is_bfloat16(norm_weight), torch.get_num_threads(), eps, norm_weight.shape[0] ** -0.5,
        kv.contiguous(), gate.contiguous(), position_bias.contiguous(), norm_weight.contiguous(),
        cos.contiguous(), sin.contiguous(), tail_kv, tail_gate, pages,
        places.slot, places.position, places.first, places.table, places.closing[m].token,
    )  # fmt: skip
