"""What a layer does differently over an engine's cache: the parameters and steps of ``Attention``, in slots and pages.

Tokens of several sequences come flat, [1, T, D]. Each operation finds a token's past through the call's places; what a
token reads of its own step is what the cache will hold of it, so nothing depends on how a sequence was cut into steps.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from dsv4.config.model import RATIO
from dsv4.model.cache import CompressorCache, LayerCache
from dsv4.model.call import Call
from dsv4.ops.attend.paged import attend_paged, write_ring_
from dsv4.ops.compress.paged import compress_paged_
from dsv4.ops.index.paged import select_paged
from dsv4.ops.linear import linear, linear_groups, linears
from dsv4.ops.lowbit import round_entries
from dsv4.ops.rmsnorm import rmsnorm
from dsv4.ops.rope import rotate, rotate_normed, rotate_unit
from dsv4.ops.rows import is_packed

if TYPE_CHECKING:
    from dsv4.model.attention import Attention, Compressor


def attention(layer: Attention, x: torch.Tensor, call: Call, cache: LayerCache) -> torch.Tensor:
    """x: [1, T, D], normalised; returns [1, T, D], and advances the cache."""
    assert call.places is not None
    assert call.row_format is not None
    backend, places, row_format = call.backend, call.places, call.row_format
    rotation, rotary_dims = call.token_rotation[layer.kind], 2 * call.token_rotation[layer.kind][0].shape[-1]
    maps, wide = [layer.wq_a, layer.wkv], [False, False]
    compressors: list[tuple[Compressor, CompressorCache, bool]] = []
    if cache.compressor is not None:
        compressors.append((layer.compressor, cache.compressor, False))
    if cache.indexer is not None:
        compressors.append((layer.indexer.compressor, cache.indexer, True))
    for compressor, _, _ in compressors:
        maps, wide = [*maps, compressor.wkv, compressor.wgate], [*wide, True, True]
    if cache.indexer is not None:
        maps, wide = [*maps, layer.indexer.weights_proj], [*wide, False]
    low, raw, *projected = linears(x[0], [m.weight for m in maps], wide=wide, backend=backend)

    q_low = rmsnorm(low, layer.q_norm.weight, layer.eps, backend=backend)  # [T, Q]
    rounds = call.rounds and not is_packed(row_format)  # which rounds when it stores, and a step reads what is stored
    kv = rotate_normed(raw[None], layer.kv_norm.weight, *rotation, layer.eps, rounds=rounds, backend=backend)
    kv = kv[0]  # [T, K]
    for (compressor, part, is_index), tokens, gate in zip(compressors, projected[::2], projected[1::2], strict=False):
        cos, sin = call.entry_rotation[layer.kind]
        compress_paged_(
            tokens, gate, compressor.ape, compressor.norm.weight, cos[0], sin[0], part.kv, part.gate, part.pages,
            places, overlap=compressor.overlap, eps=compressor.eps, row_format=row_format, is_index=is_index,
            rounds=call.rounds, dtype=x.dtype, backend=backend,
        )  # fmt: skip

    picked = None
    if cache.indexer is None:
        q = linear(q_low, layer.wq_b.weight, backend=backend)
    else:
        indexer = layer.indexer
        q, index_q = linears(q_low, [layer.wq_b.weight, indexer.wq_b.weight], wide=[False, False], backend=backend)
        index_q = index_q.view(1, -1, indexer.num_heads, indexer.head_dim)
        index_q = rotate(index_q, *rotation, backend=backend)[0]  # [T, I, J]
        if call.rounds:
            index_q = round_entries(index_q, 0, is_index=True, backend=backend)
        weights, scale = projected[-1], indexer.head_dim**-0.5 * indexer.num_heads**-0.5
        if math.frexp(scale)[0] != 0.5:  # a power of two rounds nothing, and changes no choice
            weights = weights * scale
        picked = select_paged(
            index_q, weights, cache.indexer.pages, places, indexer.top_k, row_format=row_format, backend=backend
        )
    heads = q.view(1, -1, layer.num_heads, layer.head_dim)  # [1, T, H, K]
    pages = None if cache.compressor is None else cache.compressor.pages
    out = attend_paged(
        rotate_unit(heads, *rotation, layer.eps, backend=backend)[0], kv, layer.attn_sink, cache.ring, places,
        pages=pages, picked=picked, window=layer.window, ratio=RATIO[layer.kind], row_format=row_format,
        rotary_dims=rotary_dims, scale=layer.head_dim**-0.5, backend=backend,
    )  # fmt: skip
    write_ring_(kv, cache.ring, places, row_format=row_format, rotary_dims=rotary_dims, backend=backend)
    out = rotate(out[None], *rotation, inverse=True, backend=backend)[0]  # [T, H, K]
    grouped = out.view(out.shape[0], layer.groups, -1)  # [T, G, H K / G]
    wo_a = layer.wo_a.matrix(x.dtype, backend).unflatten(0, (layer.groups, -1))  # [G, O, H K / G]
    return linear(linear_groups(grouped, wo_a, backend=backend), layer.wo_b.weight, backend=backend)[None]
