"""Compression in an engine step: several sequences in one flat list, entries into pages (report 3.6).

A block that the step completes is pooled as ``dsv4.ops.compress`` does, normalised, rotated to its first token and
stored. Its tokens, and overlapped those of the block before, are the step's own, or older ones from the tail of the
sequence's slot:

    token p of slot s:                    tail[s, p % L]
    entry of slot s that begins at p:     pages[table[s, p // 128], p % 128 // m]

Pooling runs in float32. The entry is rounded to ``dtype`` when pooled, when normalised and when rotated, then to its
row format. Native and in Triton, its sums run over the tokens in their order, wherever these lie.
"""

from __future__ import annotations

import torch

from dsv4.ops.backend import Backend, triton_kernel
from dsv4.ops.compress import paged_native, pool
from dsv4.ops.lowbit import round_entries
from dsv4.ops.places import PAGE_TOKENS, Places
from dsv4.ops.rmsnorm import rmsnorm
from dsv4.ops.rope import rotate
from dsv4.ops.rows import RowFormat, check_format, index_row_bytes, pack, pack_index, row_bytes, write_index_pages_
from dsv4.ops.shapes import Shapes


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
    *,
    overlap: bool,
    eps: float,
    row_format: RowFormat,
    is_index: bool,
    rounds: bool = False,
    dtype: torch.dtype,
    backend: Backend = "portable",
) -> None:
    """Store the entries of the blocks that the step completes, then its tokens. Overwrites pages and tails.

    kv, gate: [T, E] float32, E the entry width K, or twice that when overlapped; position_bias: [m, E] float32;
    norm_weight: [K]; cos, sin: [C, R / 2] float32, at the first tokens of the C blocks in ``places.closing[m]``;
    tail_kv, tail_gate: [slots, L, E] float32, the last L tokens of each sequence, L at least m, overlapped 2 m;
    pages: [pages, 128 / m, bytes] uint8, rows in ``row_format``, or indexer keys. rounds: entries are rounded as
    released, whatever the format (``lowbit.round_rows`` in groups of 64, ``lowbit.round_index``). No gradient passes.
    """
    _check_projections(kv, gate, position_bias, norm_weight, tail_kv, tail_gate, overlap)
    _check_places(places, len(kv), position_bias.shape[0], len(cos))
    _check_entries(position_bias.shape[0], norm_weight.shape[0], cos, sin, pages, row_format, is_index)
    given = (kv, gate, position_bias, norm_weight, cos, sin, tail_kv, tail_gate, pages, places)
    if backend == "native" and paged_native.serves(kv, norm_weight, dtype):
        paged_native.compress_paged_(*given, overlap, eps, row_format, is_index, rounds, dtype)
        return
    kernel = triton_kernel(backend, "compress.paged_triton:compress_paged_")
    if kernel is not None and dtype != torch.float64:
        kernel(*given, overlap, eps, row_format, is_index, rounds, dtype)
        return
    with torch.no_grad():
        if len(cos):
            _store_entries_(*given, overlap, eps, row_format, is_index, rounds, dtype, backend)
        _store_tokens_(kv, tail_kv, places)
        _store_tokens_(gate, tail_gate, places)


def _store_entries_(
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
    backend: Backend,
) -> None:
    """Gather each block, overlapped with the one before, and compress it as a row of its own."""
    m = position_bias.shape[0]
    last = places.closing[m].token.long()  # [C]
    begin = places.position[last].long() + 1 - m
    kv, gate = (_gather(step, tail, places, last, m, overlap) for step, tail in ((kv, tail_kv), (gate, tail_gate)))
    is_first = torch.stack([begin >= 0, begin == 0], dim=1) if overlap else None  # [C, 2]
    pooled = pool(kv, gate, position_bias, overlap=overlap, is_first=is_first, backend=backend)[None, :, -1]
    entries = rmsnorm(pooled.to(dtype), norm_weight, eps, backend=backend)  # [1, C, K]
    entries = rotate(entries, cos[None], sin[None], backend=backend)[0]
    if rounds:
        entries = round_entries(entries, 2 * cos.shape[-1], is_index=is_index, backend=backend)
    page = places.table[places.slot[last].long(), begin // PAGE_TOKENS].long()
    entry = begin % PAGE_TOKENS // m
    if is_index:
        rows = pack_index(entries, row_format=row_format, backend=backend)
        write_index_pages_(pages, page, entry, rows, row_format=row_format, channels=entries.shape[-1])
    else:
        pages[page, entry] = pack(entries, row_format=row_format, rotary_dims=2 * cos.shape[-1], backend=backend)


def _gather(
    step: torch.Tensor, tail: torch.Tensor, places: Places, last: torch.Tensor, m: int, overlap: bool
) -> torch.Tensor:
    """Return the blocks that end at flat tokens ``last``, [C, 1 or 2, m, E], the block before first.

    Zeros stand where a sequence has no token yet.
    """
    back = torch.arange(2 * m if overlap else m, device=step.device).flip(0)
    flat, position = last[:, None] - back, places.position[last].long()[:, None] - back  # [C, n]
    older = tail[places.slot[last].long()[:, None], position.clamp(min=0) % tail.shape[1]]  # [C, n, E]
    is_now = flat >= places.first[last][:, None]
    tokens = torch.where(is_now[..., None], step[flat.clamp(min=0)], older)
    return tokens.masked_fill((position < 0)[..., None], 0).unflatten(1, (-1, m))


def _store_tokens_(step: torch.Tensor, tail: torch.Tensor, places: Places) -> None:
    """Store the step's last L tokens of each sequence, [T, E], in the tail of its slot. Overwrites tail."""
    first, num_tokens, L = places.first.long(), len(step), tail.shape[1]
    later = torch.arange(num_tokens, device=step.device) + L
    is_kept = (later >= num_tokens) | (first[later.clamp(max=max(num_tokens - 1, 0))] != first)
    kept = is_kept.nonzero()[:, 0]
    tail[places.slot[kept].long(), places.position[kept].long() % L] = step[kept]


def _check_projections(
    kv: torch.Tensor,
    gate: torch.Tensor,
    position_bias: torch.Tensor,
    norm_weight: torch.Tensor,
    tail_kv: torch.Tensor,
    tail_gate: torch.Tensor,
    overlap: bool,
) -> None:
    shapes = Shapes()
    shapes.check("kv", kv, "T E")
    shapes.check("gate", gate, "T E")
    shapes.check("position_bias", position_bias, "m E")
    shapes.check("norm_weight", norm_weight, "K")
    shapes.check("tail_kv", tail_kv, "S L E")
    shapes.check("tail_gate", tail_gate, "S L E")
    parts = 2 if overlap else 1
    m, wanted = position_bias.shape[0], parts * norm_weight.shape[0]
    if kv.shape[1] != wanted:
        raise ValueError(f"kv has {kv.shape[1]} channels; expected {wanted}, {parts} x those of norm_weight")
    if m < 1 or PAGE_TOKENS % m:
        raise ValueError(f"position_bias has {m} rows; expected a divisor of {PAGE_TOKENS}, the tokens of a page")
    if tail_kv.shape[1] < parts * m:
        raise ValueError(f"tail_kv holds {tail_kv.shape[1]} tokens; expected at least {parts * m}")
    _check_float32(kv=kv, gate=gate, position_bias=position_bias, tail_kv=tail_kv, tail_gate=tail_gate)
    for name, tail in (("tail_kv", tail_kv), ("tail_gate", tail_gate)):
        if not tail.is_contiguous():
            raise ValueError(f"{name} has strides {tail.stride()}; expected a contiguous tensor")


def _check_entries(
    m: int,
    K: int,
    cos: torch.Tensor,
    sin: torch.Tensor,
    pages: torch.Tensor,
    row_format: RowFormat,
    is_index: bool,
) -> None:
    shapes = Shapes()
    shapes.check("cos", cos, "C r")
    shapes.check("sin", sin, "C r")
    _check_float32(cos=cos, sin=sin)
    check_format(row_format, K, 2 * cos.shape[1])
    row = index_row_bytes(row_format, K) if is_index else row_bytes(row_format, K, 2 * cos.shape[1])
    shapes.check("pages", pages, f"pages {PAGE_TOKENS // m} {row}")
    if pages.dtype != torch.uint8 or not pages.is_contiguous():
        raise ValueError(f"pages has dtype {pages.dtype} and strides {pages.stride()}; expected contiguous uint8")


def _check_places(places: Places, num_tokens: int, m: int, num_blocks: int) -> None:
    if m not in places.closing:
        raise ValueError(
            f"places.closing has the ratios {sorted(places.closing)}; expected {m}, as position_bias has rows"
        )
    sizes = {
        "slot": (places.slot, [num_tokens]),
        "position": (places.position, [num_tokens]),
        "first": (places.first, [num_tokens]),
        "table": (places.table, list(places.table.shape[:2])),
        f"closing[{m}].token": (places.closing[m].token, [num_blocks]),
    }
    for name, (place, size) in sizes.items():
        if list(place.shape) != size or place.dtype != torch.int32 or not place.is_contiguous():
            has = f"places.{name} has shape {list(place.shape)} and dtype {place.dtype}"
            raise ValueError(f"{has}; expected {size}, contiguous int32")


def _check_float32(**tensors: torch.Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise ValueError(f"{name} has dtype {tensor.dtype}; expected torch.float32")
