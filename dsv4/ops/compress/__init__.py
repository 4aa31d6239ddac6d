"""Gated pooling of m tokens into one compressed entry (report 2.3.1 and 2.3.2, equations 9 to 12 and 20 to 23).

Plain (HCA): the entry of a block of m tokens is, per channel, the softmax over the block of
``gate + position_bias`` applied to ``kv``.

Overlapped (CSA): projections are twice as wide. The first half of a token's channels is what it gives to
the *next* block's entry, the second half what it gives to its own. The softmax runs over 2 m slots: the
previous block's first halves and the block's own second halves. The first block has no previous one.

Tokens that do not fill a block yield nothing yet; they travel in the tail, to be continued by the next call.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from dsv4.ops.backend import Backend, pick, triton_kernel
from dsv4.ops.compiled import compiled
from dsv4.ops.compress import portable, reference
from dsv4.ops.lowbit import round_entries
from dsv4.ops.rope import rotate_normed
from dsv4.ops.shapes import Shapes


class Tail(NamedTuple):
    """The tokens a later entry still needs: [B, n, E] each, oldest first.

    The last n mod m of them are the block in progress. Overlapped, once a block is complete, they are
    preceded by the m tokens of that block. No tokens is n = 0, never a fill value.
    """

    kv: torch.Tensor
    gate: torch.Tensor


def compress(
    kv: torch.Tensor,
    gate: torch.Tensor,
    position_bias: torch.Tensor,
    *,
    overlap: bool,
    tail: Tail | None = None,
    backend: Backend = "portable",
) -> tuple[torch.Tensor, Tail]:
    """Pool consecutive tokens of each row, continuing from ``tail``.

    kv, gate: [B, T, E] float32, E the entry width, or twice that when overlapped;
    position_bias: [m, E] float32, added to the gate by position inside the block.
    Returns the entries completed by these tokens, [B, C, K] float32, and the new tail.
    """
    shapes = Shapes()
    shapes.check("kv", kv, "B T E")
    shapes.check("gate", gate, "B T E")
    shapes.check("position_bias", position_bias, "m E")
    ratio = shapes.size("m")
    if tail is not None:
        shapes.check("tail.kv", tail.kv, "B n E")
        shapes.check("tail.gate", tail.gate, "B n E")
        limit = 2 * ratio if overlap else ratio
        if tail.kv.shape[1] >= limit:
            raise ValueError(f"tail holds {tail.kv.shape[1]} tokens; expected fewer than {limit}")
        kv, gate = torch.cat([tail.kv, kv], dim=1), torch.cat([tail.gate, gate], dim=1)  # [B, n + T, E]
    continues = overlap and tail is not None and tail.kv.shape[1] >= ratio
    num_blocks = kv.shape[1] // ratio
    entries = pool(
        kv[:, : num_blocks * ratio].unflatten(1, (num_blocks, ratio)),
        gate[:, : num_blocks * ratio].unflatten(1, (num_blocks, ratio)),
        position_bias,
        overlap=overlap,
        backend=backend,
    )
    kept = kv.shape[1] % ratio + (ratio if overlap and num_blocks else 0)
    rest = kv.shape[1] - kept
    return entries[:, 1:] if continues else entries, Tail(kv[:, rest:], gate[:, rest:])


def pool(
    kv: torch.Tensor,
    gate: torch.Tensor,
    position_bias: torch.Tensor,
    *,
    overlap: bool,
    is_first: torch.Tensor | None = None,
    backend: Backend = "portable",
) -> torch.Tensor:
    """Pool complete blocks into entries.

    kv, gate: [B, C, m, E] float32; position_bias: [m, E] float32; is_first: [B, C] bool, blocks that start
    a document and so have no previous block (None: block 0 of each row). Returns [B, C, K] float32.
    """
    shapes = Shapes()
    shapes.check("kv", kv, "B C m E")
    shapes.check("gate", gate, "B C m E")
    shapes.check("position_bias", position_bias, "m E")
    if overlap and kv.shape[-1] % 2:
        raise ValueError(f"kv has {kv.shape[-1]} channels; expected an even number, two halves, to overlap")
    if is_first is None:
        is_first = torch.arange(kv.shape[1], device=kv.device).expand(kv.shape[:2]) == 0
    shapes.check("is_first", is_first, "B C")
    if overlap:
        chosen = pick(
            backend,
            reference=reference.pool_overlapped,
            portable=portable.pool_overlapped,
            compiled=compiled(portable.pool_overlapped, channels=2),
            triton="compress.triton:pool_overlapped",
        )
        return chosen(kv, gate + position_bias, is_first)
    return pick(
        backend, reference=reference.pool_plain, portable=portable.pool_plain, triton="compress.triton:pool_plain"
    )(kv, gate + position_bias)


def entries(
    kv: torch.Tensor,
    gate: torch.Tensor,
    position_bias: torch.Tensor,
    norm_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    overlap: bool,
    eps: float,
    dtype: torch.dtype,
    is_first: torch.Tensor | None = None,
    is_index: bool = False,
    rounds: bool = False,
    backend: Backend = "portable",
) -> torch.Tensor:
    """Pool complete blocks into entries as attention and the indexer see them: [B, C, K] in ``dtype``.

    What ``pool`` gives, rounded to ``dtype`` there and after each step: normalised with norm_weight [K], rotated by cos
    and sin, [B, C, R / 2] float32, and with ``rounds`` rounded as released: ``lowbit.round_entries``.
    """
    shapes = Shapes()
    shapes.check("kv", kv, "B C m E")
    shapes.check("norm_weight", norm_weight, "K")
    shapes.check("cos", cos, "B C r")
    shapes.check("sin", sin, "B C r")
    wanted = norm_weight.shape[0] * (2 if overlap else 1)
    if kv.shape[3] != wanted:
        raise ValueError(
            f"kv has {kv.shape[3]} channels; expected {wanted}, {wanted // len(norm_weight)} x norm_weight's"
        )
    kernel = triton_kernel(backend, "compress.triton_entries:entries")
    if kernel is None or kv.dtype != torch.float32 or dtype == torch.float64:
        pooled = pool(kv, gate, position_bias, overlap=overlap, is_first=is_first, backend=backend)
        made = rotate_normed(pooled.to(dtype), norm_weight, cos, sin, eps, backend=backend)
        return round_entries(made, 2 * cos.shape[-1], is_index=is_index, backend=backend) if rounds else made
    if is_first is None:
        is_first = torch.arange(kv.shape[1], device=kv.device).expand(kv.shape[:2]) == 0
    shapes.check("gate", gate, "B C m E")
    shapes.check("position_bias", position_bias, "m E")
    shapes.check("is_first", is_first, "B C")
    given = (kv, gate, position_bias, norm_weight, cos, sin, is_first if overlap else None)
    return kernel(*given, eps, is_index, rounds, dtype)
