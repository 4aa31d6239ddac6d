"""What one forward call decides for every layer. Layers read it and change nothing in it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dsv4.config.model import RATIO, LayerKind, ModelConfig
from dsv4.model.rows import Rows
from dsv4.ops import rope
from dsv4.ops.backend import Backend

Rotation = tuple[torch.Tensor, torch.Tensor]
"""Cosine and sine, [B, T, R / 2] float32 each."""


@dataclass(frozen=True)
class Call:
    """token_ids: [B, T] int64. dense: CSA attends to every visible entry instead of the indexer's picks."""

    token_ids: torch.Tensor
    rows: Rows
    token_rotation: dict[LayerKind, Rotation]
    entry_rotation: dict[LayerKind, Rotation]
    backend: Backend
    dense: bool


def make_call(
    config: ModelConfig, token_ids: torch.Tensor, rows: Rows, *, backend: Backend = "portable", dense: bool = False
) -> Call:
    """Form the rotations of a call: one table for window layers, one for CSA and HCA (report 2.3.3)."""
    r = config.rope
    dims = config.attention.rotary_dims
    plain = rope.frequencies(dims, r.theta).to(token_ids.device)
    compressed = rope.frequencies(
        dims,
        r.compress_theta,
        factor=r.factor,
        original_context=r.original_context,
        beta_fast=r.beta_fast,
        beta_slow=r.beta_slow,
    ).to(token_ids.device)
    of_window = rope.angles(rows.positions, plain)
    of_compressed = rope.angles(rows.positions, compressed)
    entry_rotation: dict[LayerKind, Rotation] = {
        kind: rope.angles(rows.blocks[RATIO[kind]].entry_positions, compressed)
        for kind in ("csa", "hca")
        if RATIO[kind] in rows.blocks
    }
    return Call(
        token_ids=token_ids,
        rows=rows,
        token_rotation={"window": of_window, "csa": of_compressed, "hca": of_compressed},
        entry_rotation=entry_rotation,
        backend=backend,
        dense=dense,
    )
