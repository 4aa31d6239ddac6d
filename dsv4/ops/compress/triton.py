"""Pooling in one pass: a program computes one entry's channels, softmax and weighted sum, of what it reads once.

The backward pass computes the weights w again, of values v and their mean e, the entry: of its gradient g,
dv = w g and dscore = w (v - e) g. Overlapped, an entry gives its gradient to the second halves of its own block and
to the first halves of the one before, where none but it writes; the last entry leaves zeros in those of its own.
float64 is ``portable``'s: on an accelerator nothing but tests has it.
"""

# Kernels are a language of their own, in which a constexpr is a number and tensors are cut by None.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from dsv4.ops.compress import portable

ELEMENTS = 4096  # values, and scores, of a program at most
CHANNELS = 256  # of a program at most, so that 512 of an entry with few tokens are two programs
WARPS = 4


def pool_plain(kv: torch.Tensor, score: torch.Tensor) -> torch.Tensor:
    """kv, score: [B, C, m, K]; returns [B, C, K]."""
    if torch.float64 in (kv.dtype, score.dtype):
        return portable.pool_plain(kv, score)
    return _Pool.apply(kv, score, None)


def pool_overlapped(kv: torch.Tensor, score: torch.Tensor, is_first: torch.Tensor) -> torch.Tensor:
    """kv, score: [B, C, m, 2K]; is_first: [B, C]; returns [B, C, K]."""
    if torch.float64 in (kv.dtype, score.dtype):
        return portable.pool_overlapped(kv, score, is_first)
    return _Pool.apply(kv, score, is_first)


class _Pool(torch.autograd.Function):
    """is_first: None of plain entries."""

    @staticmethod
    def forward(ctx, kv, score, is_first):
        kv, score = (x if x.stride(-1) == 1 else x.contiguous() for x in (kv, score))
        is_first = None if is_first is None else is_first.contiguous().view(torch.uint8)
        B, C, _, width = kv.shape
        entries = torch.empty(B, C, width if is_first is None else width // 2, dtype=kv.dtype, device=kv.device)
        _launch(_pool_kernel, kv, score, is_first, (entries,))
        ctx.save_for_backward(kv, score, is_first)
        return entries

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        kv, score, is_first = ctx.saved_tensors
        dkv, dscore = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (kv, score))
        _launch(_pool_backward_kernel, kv, score, is_first, (grad.contiguous(), dkv, dscore))
        return dkv, dscore, None


def _launch(
    kernel, kv: torch.Tensor, score: torch.Tensor, is_first: torch.Tensor | None, others: tuple[torch.Tensor, ...]
) -> None:
    B, C, m, width = kv.shape
    K = width if is_first is None else width // 2
    if B * C * K:
        tokens = triton.next_power_of_2(m)
        channels = min(triton.next_power_of_2(K), CHANNELS, max(16, ELEMENTS // tokens))
        strides = kv.stride()[:3] + score.stride()[:3]
        kernel[(B * C, triton.cdiv(K, channels))](
            kv, score, kv if is_first is None else is_first, *others, C, *strides, m, K, tokens, channels,
            is_first is not None, num_warps=WARPS,
        )  # fmt: skip


@triton.jit
def _among(token, channel, tokens, channels):
    """Which places [M, N] are among the first so many tokens and channels."""
    return (token < tokens)[:, None] & (channel < channels)[None, :]


@triton.jit
def _load(x, token, channel, is_in, stride, other: tl.constexpr):
    """Values of tokens and channels, [M, N] float32, and ``other`` where there are none."""
    return tl.load(x + token[:, None] * stride + channel[None, :], mask=is_in, other=other).to(tl.float32)


@triton.jit
def _softmax(own, previous, OVERLAP: tl.constexpr):
    """Numbers in proportion to the weights [M, N] of a block's tokens and of those before it, and one over the sum."""
    most = tl.max(own, axis=0)
    if OVERLAP:
        most = tl.maximum(most, tl.max(previous, axis=0))
    own = tl.exp(own - most[None, :])
    total = tl.sum(own, axis=0)
    if OVERLAP:
        previous = tl.exp(previous - most[None, :])
        total += tl.sum(previous, axis=0)
    return own, previous, 1 / total


@triton.jit
def _pooled(
    kv, score, is_first, C, kv_b, kv_c, kv_m, score_b, score_c, score_m,
    m: tl.constexpr, K: tl.constexpr, M: tl.constexpr, N: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """This program's entry and channels, [N], its two softmaxes' shares, not yet divided, and what they weigh, [M, N].

    Block 0 has no previous block, whatever is_first says. What a block that is first takes from it is 0.
    """
    entry = tl.program_id(0).to(tl.int64)
    b, i = entry // C, entry % C
    token, channel = tl.arange(0, M), tl.program_id(1) * N + tl.arange(0, N)
    is_in = _among(token, channel, m, K)
    kv += b * kv_b + i * kv_c
    score += b * score_b + i * score_c
    half: tl.constexpr = K if OVERLAP else 0
    own = _load(score, token, channel + half, is_in, score_m, float("-inf"))
    own = tl.where((channel < K)[None, :], own, 0.0)  # so that channels which are none have no infinite difference
    values = _load(kv, token, channel + half, is_in, kv_m, 0.0)
    previous, previous_values = own, values
    if OVERLAP:
        has_previous = (i > 0) & (tl.load(is_first + entry).to(tl.int32) == 0)
        is_given = _among(token, channel, tl.where(has_previous, m, 0), K)
        previous = _load(score - score_c, token, channel, is_given, score_m, float("-inf"))
        previous_values = _load(kv - kv_c, token, channel, is_given, kv_m, 0.0)
    own, previous, share = _softmax(own, previous, OVERLAP)
    pooled = tl.sum(own * values, axis=0)
    if OVERLAP:
        pooled += tl.sum(previous * previous_values, axis=0)
    return pooled * share, share, own, values, previous, previous_values


@triton.jit
def _pool_kernel(
    kv, score, is_first, entries, C, kv_b, kv_c, kv_m, score_b, score_c, score_m,
    m: tl.constexpr, K: tl.constexpr, M: tl.constexpr, N: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    pooled, _, _, _, _, _ = _pooled(
        kv, score, is_first, C, kv_b, kv_c, kv_m, score_b, score_c, score_m, m, K, M, N, OVERLAP
    )
    channel = tl.program_id(1) * N + tl.arange(0, N)
    at = tl.program_id(0).to(tl.int64) * K + channel
    tl.store(entries + at, pooled.to(entries.dtype.element_ty), mask=channel < K)


@triton.jit
def _pool_backward_kernel(
    kv, score, is_first, grad, dkv, dscore, C, kv_b, kv_c, kv_m, score_b, score_c, score_m,
    m: tl.constexpr, K: tl.constexpr, M: tl.constexpr, N: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    pooled, share, own, values, previous, previous_values = _pooled(
        kv, score, is_first, C, kv_b, kv_c, kv_m, score_b, score_c, score_m, m, K, M, N, OVERLAP
    )
    entry = tl.program_id(0).to(tl.int64)
    token, channel = tl.arange(0, M), tl.program_id(1) * N + tl.arange(0, N)
    is_in = _among(token, channel, m, K)
    scaled = share * tl.load(grad + entry * K + channel, mask=channel < K, other=0).to(tl.float32)  # [N]
    width: tl.constexpr = 2 * K if OVERLAP else K
    at = (entry * m + token)[:, None] * width + channel[None, :]
    second = at + width - K  # the second halves, or all of plain tokens
    own *= scaled[None, :]
    tl.store(dkv + second, own.to(dkv.dtype.element_ty), mask=is_in)
    tl.store(dscore + second, (own * (values - pooled[None, :])).to(dscore.dtype.element_ty), mask=is_in)
    if OVERLAP:
        i = entry % C
        previous *= scaled[None, :]
        moved = previous * (previous_values - pooled[None, :])
        before = _among(token, channel, tl.where(i > 0, m, 0), K)
        tl.store(dkv + at - m * width, previous.to(dkv.dtype.element_ty), mask=before)
        tl.store(dscore + at - m * width, moved.to(dscore.dtype.element_ty), mask=before)
        last = _among(token, channel, tl.where(i == C - 1, m, 0), K)
        nothing = tl.zeros([M, N], dtype=tl.float32)
        tl.store(dkv + at, nothing.to(dkv.dtype.element_ty), mask=last)
        tl.store(dscore + at, nothing.to(dscore.dtype.element_ty), mask=last)
