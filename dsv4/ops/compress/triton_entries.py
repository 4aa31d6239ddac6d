"""Entries of training in one kernel a direction: pooled, normalised, rotated and rounded while in registers.

A program takes one entry, whose tokens it reads once forward and twice backward, in chunks, oldest first. Backward
forms softmax, entry and norm again and goes back through them; of what each entry's program writes nothing is written
by another, as in ``triton.py``. The gradients of weight and bias are torch's own sums, over a number an entry's channel
and over the gradient of the gates.
"""

# Kernels are a language of their own, in which a constexpr is a number and tensors are cut by None.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from dsv4.ops.compress.paged_triton import DTYPES, ELEMENTS, WARPS, _as_released, _rotated, _rounded
from dsv4.ops.hadamard.triton import butterflies
from dsv4.ops.lowbit.triton_codes import bits_of, cast, number_of, raw_bits

_FLOOR = tl.constexpr(-1.0e38)  # a peak before any score, finite so that no difference is of two infinities


def entries(
    kv: torch.Tensor,
    gate: torch.Tensor,
    position_bias: torch.Tensor,
    norm_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    is_first: torch.Tensor | None,
    eps: float,
    is_index: bool,
    rounds: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    """See ``dsv4.ops.compress.entries``. is_first: None of plain entries; kv: float32; dtype: at most as wide."""
    return _Entries.apply(
        kv, gate, position_bias, norm_weight, cos, sin, is_first, eps, (is_index, rounds, DTYPES[dtype]), dtype
    )


class _Entries(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kv, gate, position_bias, norm_weight, cos, sin, is_first, eps, how, dtype):
        kv, gate = (x if x.stride(-1) == 1 else x.contiguous() for x in (kv, gate))
        position_bias, norm_weight, cos, sin = (x.contiguous() for x in (position_bias, norm_weight, cos, sin))
        is_first = None if is_first is None else is_first.contiguous().view(torch.uint8)
        made = torch.empty(*kv.shape[:2], norm_weight.shape[0], dtype=dtype, device=kv.device)
        kept = kv, gate, position_bias, norm_weight, cos, sin, is_first
        _launch(_entries_kernel, kept, (raw_bits(made),), eps, how)
        ctx.save_for_backward(*kept)
        ctx.eps, ctx.how = eps, how
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        kv, _, position_bias, norm_weight, *_ = kept = ctx.saved_tensors
        dkv, dgate = (torch.empty(kv.shape, dtype=torch.float32, device=kv.device) for _ in range(2))
        of_weight = torch.empty(grad.shape, dtype=torch.float32, device=kv.device)
        _launch(_entries_backward_kernel, kept, (raw_bits(grad.contiguous()), dkv, dgate, of_weight), ctx.eps, ctx.how)
        of_bias = dgate.sum(dim=(0, 1)).to(position_bias.dtype)
        return dkv, dgate, of_bias, of_weight.sum(dim=(0, 1)).to(norm_weight.dtype), *([None] * 6)


def _launch(kernel, kept, others: tuple[torch.Tensor, ...], eps: float, how: tuple[bool, bool, str]) -> None:
    kv, gate, position_bias, norm_weight, cos, sin, is_first = kept
    (B, C, m, _), K = kv.shape, norm_weight.shape[0]
    width, tokens = max(2, triton.next_power_of_2(K)), m if is_first is None else 2 * m
    if B * C:
        chunk = min(triton.next_power_of_2(tokens), max(1, ELEMENTS // width))
        kernel[(B * C,)](
            kv, gate, position_bias, raw_bits(norm_weight), cos, sin, kv if is_first is None else is_first, *others, C,
            *kv.stride()[:3], *gate.stride()[:3], eps, m, tokens, K, 2 * cos.shape[-1], width, width.bit_length() - 1,
            chunk, K**-0.5, is_first is not None, *how, num_warps=WARPS,
        )  # fmt: skip


@triton.jit
def _chunk(
    kv, gate, position_bias, start, given, kv_c, kv_m, gate_c, gate_m,
    m: tl.constexpr, TOKENS: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Scores and values of some of an entry's tokens, [CHUNK, WIDTH]; kv and gate point at the entry's own block.

    given: the first place that has a token. Scores are -inf where there is none, and 0, like values, in what is no
    channel.
    """
    place = start + tl.arange(0, CHUNK)
    channel = tl.arange(0, WIDTH)
    is_channel = (channel < K)[None, :]
    is_token = (place < TOKENS) & (place >= given)
    block, column = tl.zeros([CHUNK], dtype=tl.int64), channel[None, :]
    if OVERLAP:
        block = tl.where(place >= m, 0, -1).to(tl.int64)
        column = column + tl.where(place >= m, K, 0)[:, None]
    is_in = is_token[:, None] & is_channel
    token = place % m
    score = tl.load(gate + (block * gate_c + token * gate_m)[:, None] + column, mask=is_in, other=0)
    width: tl.constexpr = 2 * K if OVERLAP else K
    score += tl.load(position_bias + token[:, None] * width + column, mask=is_in, other=0)
    score = tl.where(is_token[:, None], score, float("-inf"))
    return score, tl.load(kv + (block * kv_c + token * kv_m)[:, None] + column, mask=is_in, other=0)


@triton.jit
def _pooled(
    kv, gate, position_bias, is_first, number, C, kv_b, kv_c, kv_m, gate_b, gate_c, gate_m,
    m: tl.constexpr, TOKENS: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """An entry's blocks of kv and gate, its first place with a token, and its softmax's peak, sum and mean, [WIDTH]."""
    b, i = number // C, number % C
    kv += b * kv_b + i * kv_c
    gate += b * gate_b + i * gate_c
    given = 0
    if OVERLAP:
        given = tl.where((i > 0) & (tl.load(is_first + number).to(tl.int32) == 0), 0, m)
    peak = tl.full([WIDTH], _FLOOR, dtype=tl.float32)
    total = tl.zeros([WIDTH], dtype=tl.float32)
    acc = tl.zeros([WIDTH], dtype=tl.float32)
    for start in range(0, TOKENS, CHUNK):
        score, values = _chunk(
            kv, gate, position_bias, start, given, kv_c, kv_m, gate_c, gate_m,
            m, TOKENS, K, WIDTH, CHUNK, OVERLAP,
        )  # fmt: skip
        higher = tl.maximum(peak, tl.max(score, axis=0))
        share, shrink = tl.exp(score - higher[None, :]), tl.exp(peak - higher)
        total = total * shrink + tl.sum(share, axis=0)
        acc = acc * shrink + tl.sum(share * values, axis=0)
        peak = higher
    return kv, gate, given, peak, total, acc / total


@triton.jit
def _entries_kernel(
    kv, gate, position_bias, norm_weight, cos, sin, is_first, made, C, kv_b, kv_c, kv_m, gate_b, gate_c, gate_m, eps,
    m: tl.constexpr, TOKENS: tl.constexpr, K: tl.constexpr, R: tl.constexpr, WIDTH: tl.constexpr,
    LOG_WIDTH: tl.constexpr, CHUNK: tl.constexpr, FACTOR: tl.constexpr, OVERLAP: tl.constexpr, IS_INDEX: tl.constexpr,
    ROUNDS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0).to(tl.int64)
    _, _, _, _, _, x = _pooled(
        kv, gate, position_bias, is_first, number, C, kv_b, kv_c, kv_m, gate_b, gate_c, gate_m,
        m, TOKENS, K, WIDTH, CHUNK, OVERLAP,
    )  # fmt: skip
    x = _rounded(x, DTYPE)
    channel = tl.arange(0, WIDTH)
    weight = number_of(bits_of(tl.load(norm_weight + channel, mask=channel < K, other=0)))
    x = _rounded(x * tl.rsqrt(tl.sum(x * x, axis=0) / K + eps) * weight, DTYPE)
    pairs: tl.constexpr = R // 2
    x = _rounded(_rotated(x, cos + number * pairs, sin + number * pairs, WIDTH, K, R, False), DTYPE)
    if ROUNDS and (IS_INDEX or K > R):
        x = _as_released(x, WIDTH, LOG_WIDTH, K, R, FACTOR, IS_INDEX, DTYPE)
    tl.store(made + number * K + channel, cast(x, made.dtype.element_ty), mask=channel < K)


@triton.jit
def _entries_backward_kernel(
    kv, gate, position_bias, norm_weight, cos, sin, is_first, grad, dkv, dgate, of_weight,
    C, kv_b, kv_c, kv_m, gate_b, gate_c, gate_m, eps,
    m: tl.constexpr, TOKENS: tl.constexpr, K: tl.constexpr, R: tl.constexpr, WIDTH: tl.constexpr,
    LOG_WIDTH: tl.constexpr, CHUNK: tl.constexpr, FACTOR: tl.constexpr, OVERLAP: tl.constexpr, IS_INDEX: tl.constexpr,
    ROUNDS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """From the last step to the first, rounded after each as the operations' own gradients are."""
    number = tl.program_id(0).to(tl.int64)
    kv, gate, given, peak, total, pooled = _pooled(
        kv, gate, position_bias, is_first, number, C, kv_b, kv_c, kv_m, gate_b, gate_c, gate_m,
        m, TOKENS, K, WIDTH, CHUNK, OVERLAP,
    )  # fmt: skip
    channel = tl.arange(0, WIDTH)
    is_channel = channel < K
    coming = number_of(bits_of(tl.load(grad + number * K + channel, mask=is_channel, other=0)))
    if ROUNDS and IS_INDEX:  # a transform that is its own inverse; straight through the rounding
        sums = butterflies(tl.reshape(coming, (1, WIDTH)), 1, WIDTH, LOG_WIDTH)
        coming = _rounded(tl.reshape(sums, (WIDTH,)) * FACTOR, DTYPE)
    pairs: tl.constexpr = R // 2
    coming = _rounded(_rotated(coming, cos + number * pairs, sin + number * pairs, WIDTH, K, R, True), DTYPE)
    x = _rounded(pooled, DTYPE)
    inverse = tl.rsqrt(tl.sum(x * x, axis=0) / K + eps)
    normed = x * inverse
    tl.store(of_weight + number * K + channel, coming * normed, mask=is_channel)
    coming = coming * number_of(bits_of(tl.load(norm_weight + channel, mask=is_channel, other=0)))
    along = tl.sum(coming * normed, axis=0) / K
    scaled = _rounded((coming - normed * along) * inverse, DTYPE) / total
    width: tl.constexpr = 2 * K if OVERLAP else K
    i = number % C
    for start in range(0, TOKENS, CHUNK):
        score, values = _chunk(
            kv, gate, position_bias, start, given, kv_c, kv_m, gate_c, gate_m,
            m, TOKENS, K, WIDTH, CHUNK, OVERLAP,
        )  # fmt: skip
        place = start + tl.arange(0, CHUNK)
        moved = tl.exp(score - peak[None, :]) * scaled[None, :]
        at = (number * m + place)[:, None] * width + channel[None, :]
        limit = tl.where(place < TOKENS, K, 0)
        if OVERLAP:  # of the block before, the first halves: there may be one that gives nothing
            at = (number * m + place - m)[:, None] * width + channel[None, :] + tl.where(place >= m, K, 0)[:, None]
            limit = tl.where(place >= tl.where(i > 0, 0, m), limit, 0)
        is_in = channel[None, :] < limit[:, None]
        tl.store(dkv + at, moved, mask=is_in)
        tl.store(dgate + at, moved * (values - pooled[None, :]), mask=is_in)
        if OVERLAP:  # the first halves of the last block of a row are nobody's
            own = (number * m + place)[:, None] * width + channel[None, :]
            is_last = channel[None, :] < tl.where((place < m) & (i == C - 1), K, 0)[:, None]
            tl.store(dkv + own, tl.zeros([CHUNK, WIDTH], dtype=tl.float32), mask=is_last)
            tl.store(dgate + own, tl.zeros([CHUNK, WIDTH], dtype=tl.float32), mask=is_last)
