"""Compression into pages in two kernels: a program an entry, from its tokens to its stored bytes, then the tails.

The entry's program runs over the tokens in chunks, oldest first, wherever each lies: in the step, or in the tail of
its slot. Order and chunks depend on the ratio alone, so an entry has the same bits however its sequence was cut into
steps. Its channels stay in registers from there on: normalised, rotated, rounded, coded. Unlike ``pack``, nothing looks
for a NaN, for which it would have to wait; a packed row codes it as it can.
"""

# Kernels are a language of their own, in which a constexpr is a number and tensors are cut by None.

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dsv4.ops.hadamard.triton import butterflies
from dsv4.ops.lowbit.triton_codes import (
    bits_of,
    cast,
    code_of,
    factor_of,
    group_scales,
    number_of,
    raw_bits,
    value_of,
)
from dsv4.ops.places import PAGE_TOKENS, Places
from dsv4.ops.rows import RowFormat
from dsv4.ops.rows.formats import INDEX_GROUP, ROW_GROUP
from dsv4.ops.rows.triton_rows import store_keys, store_rows

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
ELEMENTS = 4096  # of a chunk: 16 values and as many scores of each of a program's threads
WARPS = 8
COPIED = 1024  # channels of a program that copies a token
_PAGE_TOKENS = tl.constexpr(PAGE_TOKENS)
_ROW_GROUP = tl.constexpr(ROW_GROUP)
_INDEX_GROUP = tl.constexpr(INDEX_GROUP)
_FLOOR = tl.constexpr(-1.0e38)  # a peak before any score, finite so that no difference is of two infinities


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
    """See ``dsv4.ops.compress.paged.compress_paged_``. dtype: float32, bfloat16 or float16."""
    (T, E), (m, K) = kv.shape, (position_bias.shape[0], norm_weight.shape[0])
    kv, gate = kv.contiguous(), gate.contiguous()
    width, tokens = max(2, triton.next_power_of_2(K)), 2 * m if overlap else m  # both powers of two: m divides 128
    of_tokens = places.slot, places.position, places.first
    if len(cos):
        _entry_kernel[(len(cos),)](
            kv, gate, position_bias.contiguous(), raw_bits(norm_weight.contiguous()), cos.contiguous(),
            sin.contiguous(), tail_kv, tail_gate, pages, places.closing[m].token, *of_tokens, places.table, eps,
            places.table.stride(0), m, tokens, K, 2 * cos.shape[1], tail_kv.shape[1], pages.shape[2], width,
            width.bit_length() - 1, min(tokens, max(1, ELEMENTS // width)), K**-0.5, overlap, row_format, is_index,
            rounds, DTYPES[dtype], num_warps=WARPS,
        )  # fmt: skip
    if T:
        block = min(COPIED, triton.next_power_of_2(E))
        _tail_kernel[(T, triton.cdiv(E, block))](
            kv, gate, tail_kv, tail_gate, *of_tokens, T, E, tail_kv.shape[1], block
        )


@triton.jit
def _rounded(x, DTYPE: tl.constexpr):
    """x float32 as a number of the dtype of activations."""
    if DTYPE == "bfloat16":
        return number_of(bits_of(cast(x, tl.int16)))
    elif DTYPE == "float16":
        return x.to(tl.float16).to(tl.float32)
    else:
        return x


@triton.jit
def _either(step, tail, here, there, is_now, is_then):
    """Numbers of tokens in the step or in a tail; 0 of those that are in neither."""
    return tl.where(is_now, tl.load(step + here, mask=is_now, other=0), tl.load(tail + there, mask=is_then, other=0))


@triton.jit
def _pooled(
    kv, gate, position_bias, tail_kv, tail_gate, token, slot, position, first,
    m: tl.constexpr, TOKENS: tl.constexpr, K: tl.constexpr, LENGTH: tl.constexpr, WIDTH: tl.constexpr,
    CHUNK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The entry whose last token is this one, [WIDTH] float32, zero from K on.

    Overlapped, of TOKENS the first m give their first halves and the others, of the entry's own block, their second.
    """
    channel = tl.arange(0, WIDTH)
    is_channel = (channel < K)[None, :]
    E: tl.constexpr = 2 * K if OVERLAP else K
    peak = tl.full([WIDTH], _FLOOR, dtype=tl.float32)
    total = tl.zeros([WIDTH], dtype=tl.float32)
    acc = tl.zeros([WIDTH], dtype=tl.float32)
    for start in range(0, TOKENS, CHUNK):
        place = start + tl.arange(0, CHUNK)
        back = TOKENS - 1 - place
        own = position - back
        column = channel[None, :]
        if OVERLAP:
            column = column + tl.where(place >= m, K, 0)[:, None]
        is_token = (own >= 0)[:, None] & is_channel
        is_now = is_token & (token - back >= first)[:, None]
        is_then = is_token & (token - back < first)[:, None]
        here = (token - back)[:, None] * E + column
        there = (slot * LENGTH + own % LENGTH)[:, None] * E + column
        score = _either(gate, tail_gate, here, there, is_now, is_then)
        score += tl.load(position_bias + (place % m)[:, None] * E + column, mask=is_channel, other=0)
        score = tl.where((own >= 0)[:, None], score, float("-inf"))
        values = _either(kv, tail_kv, here, there, is_now, is_then)
        higher = tl.maximum(peak, tl.max(score, axis=0))
        share, shrink = tl.exp(score - higher[None, :]), tl.exp(peak - higher)
        total = total * shrink + tl.sum(share, axis=0)
        acc = acc * shrink + tl.sum(share * values, axis=0)
        peak = higher
    return acc / total


@triton.jit
def _rotated(x, cos, sin, WIDTH: tl.constexpr, K: tl.constexpr, R: tl.constexpr, INVERSE: tl.constexpr):
    """Turn the last R channels of x [WIDTH] by pairs, or back; cos and sin point at the entry's own."""
    channel = tl.arange(0, WIDTH)
    turned = channel - (K - R)
    is_turned = (turned >= 0) & (channel < K)
    partner = tl.gather(x, tl.where(is_turned, K - R + (turned ^ 1), channel), 0)
    c = tl.load(cos + turned // 2, mask=is_turned, other=1)
    s = tl.load(sin + turned // 2, mask=is_turned, other=0)
    return tl.where(is_turned, x * c + partner * tl.where((turned % 2 == 0) != INVERSE, -s, s), x)


@triton.jit
def _as_released(
    x, WIDTH: tl.constexpr, LOG_WIDTH: tl.constexpr, K: tl.constexpr, R: tl.constexpr, FACTOR: tl.constexpr,
    IS_INDEX: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """``lowbit.round_entries`` of one entry: transformed and in E2M1, or in E4M3 but for what rotates."""
    if IS_INDEX:
        sums = butterflies(tl.reshape(x, (1, WIDTH)), 1, WIDTH, LOG_WIDTH)
        x = _rounded(tl.reshape(sums, (WIDTH,)) * FACTOR, DTYPE)
        group: tl.constexpr = _INDEX_GROUP if WIDTH > _INDEX_GROUP else WIDTH
        is_coded = tl.arange(0, WIDTH) < K
    else:
        group: tl.constexpr = _ROW_GROUP if WIDTH > _ROW_GROUP else WIDTH
        is_coded = tl.arange(0, WIDTH) < K - R
    bits = tl.reshape(tl.where(is_coded, bits_of(x), 0), (WIDTH // group, group))
    scale, stored = group_scales(bits, IS_INDEX)
    made = value_of(code_of(bits, scale[:, None], IS_INDEX), IS_INDEX) * factor_of(stored)[:, None]
    return tl.where(is_coded, _rounded(tl.reshape(made, (WIDTH,)), DTYPE), x)


@triton.jit
def _entry_kernel(
    kv, gate, position_bias, norm_weight, cos, sin, tail_kv, tail_gate, pages, closing, slots, positions, firsts, table,
    eps, table_stride,
    m: tl.constexpr, TOKENS: tl.constexpr, K: tl.constexpr, R: tl.constexpr, LENGTH: tl.constexpr, BYTES: tl.constexpr,
    WIDTH: tl.constexpr, LOG_WIDTH: tl.constexpr, CHUNK: tl.constexpr, FACTOR: tl.constexpr, OVERLAP: tl.constexpr,
    FORMAT: tl.constexpr, IS_INDEX: tl.constexpr, ROUNDS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """One entry: rounded to the dtype of activations when pooled, when normalised and when rotated."""
    number = tl.program_id(0).to(tl.int64)
    token = tl.load(closing + number).to(tl.int64)
    slot, position = tl.load(slots + token).to(tl.int64), tl.load(positions + token).to(tl.int64)
    first = tl.load(firsts + token)
    x = _pooled(
        kv, gate, position_bias, tail_kv, tail_gate, token, slot, position, first,
        m, TOKENS, K, LENGTH, WIDTH, CHUNK, OVERLAP,
    )  # fmt: skip
    x = _rounded(x, DTYPE)
    channel = tl.arange(0, WIDTH)
    inverse = tl.rsqrt(tl.sum(x * x, axis=0) / K + eps)
    weight = number_of(bits_of(tl.load(norm_weight + channel, mask=channel < K, other=0)))
    x = _rounded(x * inverse * weight, DTYPE)
    pairs: tl.constexpr = R // 2
    x = _rounded(_rotated(x, cos + number * pairs, sin + number * pairs, WIDTH, K, R, False), DTYPE)
    if ROUNDS and (IS_INDEX or K > R):
        x = _as_released(x, WIDTH, LOG_WIDTH, K, R, FACTOR, IS_INDEX, DTYPE)
    begin = position + 1 - m
    entries: tl.constexpr = _PAGE_TOKENS // m
    page = tl.load(table + slot * table_stride + begin // _PAGE_TOKENS).to(tl.int64)
    entry = (begin % _PAGE_TOKENS // m).to(tl.int32)
    one = tl.zeros([1], dtype=tl.int64)
    x = tl.reshape(x, (1, WIDTH))
    if IS_INDEX:
        own = pages + (one + page) * (entries * BYTES)
        store_keys(own, one == 0, entry + one.to(tl.int32), x, 1, WIDTH, K, entries, FORMAT)
    else:
        store_rows(pages + (one + page * entries + entry) * BYTES, one == 0, x, 1, WIDTH, K, R, FORMAT)


@triton.jit
def _tail_kernel(kv, gate, tail_kv, tail_gate, slots, positions, firsts, T, E, LENGTH, BLOCK: tl.constexpr):
    """Some channels of a token, which is kept if it is one of its sequence's last LENGTH in the step."""
    token = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    later = token + LENGTH
    own = tl.load(firsts + token)
    is_later_too = tl.load(firsts + later, mask=later < T, other=-1) == own
    here = token * E + channel
    place = tl.load(slots + token).to(tl.int64) * LENGTH + tl.load(positions + token) % LENGTH
    mask = channel < tl.where(is_later_too, 0, E)
    tl.store(tail_kv + place * E + channel, tl.load(kv + here, mask=mask, other=0), mask=mask)
    tl.store(tail_gate + place * E + channel, tl.load(gate + here, mask=mask, other=0), mask=mask)
