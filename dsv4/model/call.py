"""What one forward call decides for every layer. Layers read it and change nothing in it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dsv4.config.model import RATIO, LayerKind, ModelConfig
from dsv4.model.rows import Rows
from dsv4.ops import rope
from dsv4.ops.backend import Backend
from dsv4.ops.places import Places
from dsv4.ops.rows import RowFormat

Rotation = tuple[torch.Tensor, torch.Tensor]
"""Cosine and sine, [B, T, R / 2] float32 each."""


@dataclass(frozen=True)
class Call:
    """token_ids: [B, T] int64. dense: CSA attends to every visible entry instead of the indexer's picks.

    rounds: cache rows, entries and the indexer's queries and keys are rounded as released. places, row_format: of a
    call over an engine's cache, else None.
    """

    token_ids: torch.Tensor
    rows: Rows
    token_rotation: dict[LayerKind, Rotation]
    entry_rotation: dict[LayerKind, Rotation]
    backend: Backend
    dense: bool
    rounds: bool
    places: Places | None = None
    row_format: RowFormat | None = None


def make_call(
    config: ModelConfig,
    token_ids: torch.Tensor,
    rows: Rows,
    *,
    backend: Backend = "portable",
    dense: bool = False,
    rounds: bool = False,
) -> Call:
    """Form the rotations of a call: one table for window layers, one for CSA and HCA (report 2.3.3)."""
    plain, compressed = (f.to(token_ids.device) for f in frequencies(config))
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
        rounds=rounds,
    )


def make_cached_call(
    token_ids: torch.Tensor,
    places: Places,
    row_format: RowFormat,
    plain: torch.Tensor,
    compressed: torch.Tensor,
    *,
    backend: Backend,
    rounds: bool,
) -> Call:
    """Form the rotations of a step over an engine's cache.

    token_ids: [1, T] int64; plain, compressed: of ``frequencies``, where the tokens are.
    """
    positions = places.position[None]
    of_compressed = rope.angles(positions, compressed, backend=backend)
    entry_rotation: dict[LayerKind, Rotation] = {}
    for kind in ("csa", "hca"):
        if RATIO[kind] in places.closing:
            begins = places.closing[RATIO[kind]].begin
            entry_rotation[kind] = rope.angles(begins[None], compressed, backend=backend)
    return Call(
        token_ids=token_ids,
        rows=Rows(positions=positions, raw_begin=places.first[None], blocks={}),
        token_rotation={
            "window": rope.angles(positions, plain, backend=backend), "csa": of_compressed, "hca": of_compressed,
        },
        entry_rotation=entry_rotation,
        backend=backend,
        dense=False,
        rounds=rounds,
        places=places,
        row_format=row_format,
    )  # fmt: skip


def frequencies(config: ModelConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Angles per position of window layers, and of CSA and HCA."""
    r, dims = config.rope, config.attention.rotary_dims
    plain = rope.frequencies(dims, r.theta)
    compressed = rope.frequencies(
        dims,
        r.compress_theta,
        factor=r.factor,
        original_context=r.original_context,
        beta_fast=r.beta_fast,
        beta_slow=r.beta_slow,
    )
    return plain, compressed
