"""Hyper-connections on an accelerator: reading is three kernels, writing one, and each sees the streams once.
Writing and then reading is three: the first of reading is done by that which writes, on what it holds in registers.

Reading cannot be one kernel that also fills the machine. The map fn weighs 24 N D floats, more than the streams of
dozens of tokens, so a program that reads it must hold a block of tokens; the read and its norm want a program a token.
So: ``project`` (tokens by parts of D, of all streams) leaves partial products and square sums, ``_coefficients`` adds
them in order and does the Sinkhorn rounds in registers, ``_read`` takes the sum and normalises it. The parts are as
many for one token as for a million, so a token's bits never depend on the others. ``_read`` goes from the last token to
the first: what ``project`` read last is still in the second-level cache.

Kept for backward: the streams, M mixes and one inverse RMS a token; the Sinkhorn rounds are formed again.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from dsv4.ops.mhc import portable
from dsv4.ops.mhc import triton_backward as back
from dsv4.ops.mhc.triton_parts import doubly_stochastic, scaled, sum_of_streams, tiles, warps
from dsv4.ops.mhc.triton_project import project, sizes, write_project

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_CHANNELS = 16384  # of a stream: 32 float32 registers a thread with 16 warps
MOST_STREAMS = 8


def pre(
    streams: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_eps: float,
    eps: float,
    iterations: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See ``dsv4.ops.mhc.pre``."""
    if not _serves(streams, fn):
        return portable.pre(streams, fn, base, scale, norm_weight, norm_eps, eps, iterations)
    B, T, N, D = streams.shape
    x, post_weights, comb, carried = _Pre.apply(
        streams.flatten(0, 1), fn, base, scale, norm_weight, norm_eps, eps, iterations, None
    )
    return x.view(B, T, D), post_weights.view(B, T, N), comb.view(B, T, N, N), carried.view(B, T, N, D)


def write_read(
    streams: torch.Tensor,
    y: torch.Tensor,
    post_weights: torch.Tensor,
    comb: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_eps: float,
    eps: float,
    iterations: int,
    keep: Callable[[torch.Tensor], AbstractContextManager[None]],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See ``dsv4.ops.mhc.write_read``; the streams have the bits of ``post``.

    keep: a context for what keeps the streams that were written, which it takes.
    """
    if not _serves(streams, comb) or not _serves(streams, fn) or y.dtype not in DTYPES:
        written = post(streams, y, post_weights, comb)
        with keep(written):
            return pre(written, fn, base, scale, norm_weight, norm_eps, eps, iterations)
    B, T, N, D = streams.shape
    given = (x.flatten(0, 1) for x in (streams, y, post_weights, comb))
    written, partial = _PostAhead.apply(*given, fn)
    with keep(written):
        x, post_weights, comb, carried = _Pre.apply(
            written, fn, base, scale, norm_weight, norm_eps, eps, iterations, partial
        )
    return x.view(B, T, D), post_weights.view(B, T, N), comb.view(B, T, N, N), carried.view(B, T, N, D)


def post(streams: torch.Tensor, y: torch.Tensor, post_weights: torch.Tensor, comb: torch.Tensor) -> torch.Tensor:
    """See ``dsv4.ops.mhc.post``."""
    if not _serves(streams, comb) or y.dtype not in DTYPES:
        return portable.post(streams, y, post_weights, comb)
    mixed = _Post.apply(streams.flatten(0, 1), y.flatten(0, 1), post_weights.flatten(0, 1), comb.flatten(0, 1))
    return mixed.view(streams.shape)


def head(
    streams: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_eps: float,
    eps: float,
) -> torch.Tensor:
    """See ``dsv4.ops.mhc.head``."""
    if not _serves(streams, fn):
        return portable.head(streams, fn, base, scale, norm_weight, norm_eps, eps)
    x, _, _, _ = _Pre.apply(streams.flatten(0, 1), fn, base, scale, norm_weight, norm_eps, eps, 0, None)
    return x.view(*streams.shape[:2], streams.shape[-1])


def sinkhorn(logits: torch.Tensor, eps: float, iterations: int) -> torch.Tensor:
    """See ``dsv4.ops.mhc.sinkhorn``."""
    N = logits.shape[-1]
    if logits.dtype != torch.float32 or N > MOST_STREAMS:
        return portable.sinkhorn(logits, eps, iterations)
    return _Sinkhorn.apply(logits.reshape(-1, N, N), eps, iterations).view(logits.shape)


def _serves(streams: torch.Tensor, coefficients: torch.Tensor) -> bool:
    small = streams.shape[2] <= MOST_STREAMS and streams.shape[3] <= MOST_CHANNELS
    return small and streams.dtype in DTYPES and coefficients.dtype == torch.float32


class _Pre(torch.autograd.Function):
    """Reading and normalisation. With no iterations there is a head's read alone, without post and comb.

    partial: what ``project`` would find, if another kernel has found it already.
    """

    @staticmethod
    def forward(ctx, streams, fn, base, scale, norm_weight, norm_eps, eps, iterations, partial):
        streams, fn, base, scale, norm_weight = (x.contiguous() for x in (streams, fn, base, scale, norm_weight))
        T, N, D = streams.shape
        M = len(fn)
        x, mixes, inverse_rms = streams.new_empty(T, D), fn.new_empty(T, M), fn.new_empty(T)
        post_weights = fn.new_empty(T if iterations else 0, N)
        comb = fn.new_empty(T if iterations else 0, N, N)
        if T and D:
            c, P = tiles(streams.dtype), triton.next_power_of_2(N)
            if partial is None:
                partial = fn.new_empty(T, c.parts, M + 1)
                project[(triton.cdiv(T, c.tokens), c.parts)](
                    streams, fn, partial, T, **sizes(c, M, N, D, c.channels), STAGES=c.stages
                )  # fmt: skip
            _coefficients[(triton.cdiv(T, c.tokens_of_coefficients),)](
                partial, base, scale, mixes, inverse_rms, post_weights, comb, T, norm_eps, eps,
                N=N, P=P, M=M, SIZE=N * D, PARTS=c.parts, ITERATIONS=iterations, TOKENS=c.tokens_of_coefficients,
                num_warps=1,
            )  # fmt: skip
            _read[(T,)](
                streams, mixes, base, scale, norm_weight, x, T, norm_eps, eps,
                N=N, M=M, D=D, BLOCK=triton.next_power_of_2(D), num_warps=warps(D),
            )  # fmt: skip
        ctx.save_for_backward(streams, fn, base, scale, norm_weight, mixes, inverse_rms)
        ctx.norm_eps, ctx.eps, ctx.iterations = norm_eps, eps, iterations
        ctx.set_materialize_grads(False)
        return x, post_weights, comb, streams.view_as(streams)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_x, grad_post, grad_comb, grad_carried):
        grads = back.pre(
            *ctx.saved_tensors, ctx.norm_eps, ctx.eps, ctx.iterations, grad_x, grad_post, grad_comb, grad_carried
        )
        return *grads, None, None, None, None


class _Post(torch.autograd.Function):
    @staticmethod
    def forward(ctx, streams, y, post_weights, comb):
        kept = [x.contiguous() for x in (streams, y, post_weights, comb)]
        T, N, D = streams.shape
        out = torch.empty_like(kept[0])
        if out.numel():
            block = min(triton.next_power_of_2(D), tiles(streams.dtype).channels_of_a_write)
            _write[(T, triton.cdiv(D, block))](*kept, out, N=N, D=D, BLOCK=block, num_warps=4)
        ctx.save_for_backward(*kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return back.post(*ctx.saved_tensors, grad)


class _PostAhead(torch.autograd.Function):
    """Writing, and what ``project`` finds in what was written. Nothing passes back through the latter: it does in
    ``_Pre``, from which it was taken."""

    @staticmethod
    def forward(ctx, streams, y, post_weights, comb, fn):
        kept = [x.contiguous() for x in (streams, y, post_weights, comb)]
        T, N, D = streams.shape
        c, M = tiles(streams.dtype), len(fn)
        out, partial = torch.empty_like(kept[0]), fn.new_empty(T, c.parts, M + 1)
        if out.numel():
            write_project[(triton.cdiv(T, c.tokens), c.parts)](
                *kept, fn.contiguous(), out, partial, T, **sizes(c, M, N, D, c.channels_ahead), STAGES=c.stages_ahead
            )
        ctx.save_for_backward(*kept)
        ctx.mark_non_differentiable(partial)
        return out, partial

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        return *back.post(*ctx.saved_tensors, grad), None


class _Sinkhorn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, eps, iterations):
        logits = logits.contiguous()
        comb = torch.empty_like(logits)
        T, N, _ = logits.shape
        if logits.numel():
            tokens = tiles(logits.dtype).tokens_of_coefficients
            _project_onto_doubly_stochastic[(triton.cdiv(T, tokens),)](
                logits, comb, T, eps, N=N, P=triton.next_power_of_2(N), ITERATIONS=iterations, TOKENS=tokens,
                num_warps=1,
            )  # fmt: skip
        ctx.save_for_backward(logits)
        ctx.eps, ctx.iterations = eps, iterations
        return comb

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (logits,) = ctx.saved_tensors
        return back.sinkhorn(grad, logits, ctx.eps, ctx.iterations), None, None


@triton.jit(do_not_specialize=["num_tokens"])
def _coefficients(
    partial, base, scale, mixes, inverse_rms, post_weights, comb, num_tokens, norm_eps, eps,
    N: tl.constexpr, P: tl.constexpr, M: tl.constexpr, SIZE: tl.constexpr, PARTS: tl.constexpr,
    ITERATIONS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """From the partial sums of a block of tokens to its mixes and weights. P is N or the power of two above it."""
    tokens = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    is_token = tokens < num_tokens
    i = tl.arange(0, P)
    at = tokens[:, None] * N + i[None, :]
    of_mix = tokens[:, None] * M + i[None, :]
    inside = is_token[:, None] & (i < N)[None, :]
    square = tl.zeros([TOKENS], dtype=tl.float32)
    first = tl.zeros([TOKENS, P], dtype=tl.float32)
    for part in range(PARTS):
        begin = partial + (tokens * PARTS + part) * (M + 1)
        square += tl.load(begin + M, mask=is_token, other=1.0)
        first += tl.load(begin[:, None] + i[None, :], mask=inside, other=0.0)
    inverse = tl.rsqrt(square / SIZE + norm_eps)
    tl.store(inverse_rms + tokens, inverse, mask=is_token)
    tl.store(mixes + of_mix, first * inverse[:, None], mask=inside)
    if ITERATIONS > 0:
        # comb's rows and columns: [1, P, P]
        place = i[None, :, None] * N + i[None, None, :]
        is_place = (i < N)[None, :, None] & (i < N)[None, None, :]
        is_square = is_token[:, None, None] & is_place
        second = tl.zeros([TOKENS, P], dtype=tl.float32)
        third = tl.zeros([TOKENS, P, P], dtype=tl.float32)
        for part in range(PARTS):
            begin = partial + (tokens * PARTS + part) * (M + 1)
            second += tl.load(begin[:, None] + N + i[None, :], mask=inside, other=0.0)
            third += tl.load(begin[:, None, None] + 2 * N + place, mask=is_square, other=0.0)
        second = second * inverse[:, None]
        third = third * inverse[:, None, None]
        tl.store(mixes + of_mix + N, second, mask=inside)
        tl.store(mixes + tokens[:, None, None] * M + 2 * N + place, third, mask=is_square)
        gate = tl.sigmoid(scaled(second, base + N + i[None, :], scale + 1, (i < N)[None, :]))
        tl.store(post_weights + at, 2 * gate, mask=inside)
        logits = scaled(third, base + 2 * N + place, scale + 2, is_place)
        value = doubly_stochastic(logits, is_place, eps, ITERATIONS)
        tl.store(comb + tokens[:, None, None] * (N * N) + place, value, mask=is_square)


@triton.jit(do_not_specialize=["num_tokens"])
def _project_onto_doubly_stochastic(
    logits, comb, num_tokens, eps,
    N: tl.constexpr, P: tl.constexpr, ITERATIONS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    i = tl.arange(0, P)
    is_place = (i < N)[None, :, None] & (i < N)[None, None, :]
    inside = (tokens < num_tokens)[:, None, None] & is_place
    at = tokens[:, None, None] * (N * N) + i[None, :, None] * N + i[None, None, :]
    given = tl.load(logits + at, mask=inside, other=0.0)
    tl.store(comb + at, doubly_stochastic(given, is_place, eps, ITERATIONS), mask=inside)


@triton.jit(do_not_specialize=["num_tokens"])
def _read(
    streams, mixes, base, scale, norm_weight, x, num_tokens, norm_eps, eps,
    N: tl.constexpr, M: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token, from the last to the first: the sum of its streams, held in registers, and its norm."""
    token = num_tokens - 1 - tl.program_id(0).to(tl.int64)
    channels = tl.arange(0, BLOCK)
    inside = channels < D
    u = sum_of_streams(streams + token * N * D, channels, mixes + token * M, base, scale, eps, inside, N, D)
    inverse = tl.rsqrt(tl.sum(u * u, axis=0) / D + norm_eps)
    weight = tl.load(norm_weight + channels, mask=inside, other=0.0).to(tl.float32)
    tl.store(x + token * D + channels, (u * inverse * weight).to(x.dtype.element_ty), mask=inside)


@triton.jit
def _write(
    streams, y, post_weights, comb, out,
    N: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Some channels of one token: X'_k = post_k y + sum_j comb_jk X_j. Streams come from the cache again."""
    token = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channels < D
    written = tl.load(y + token * D + channels, mask=inside, other=0.0).to(tl.float32)
    for k in tl.static_range(N):
        value = written * tl.load(post_weights + token * N + k)
        for j in tl.static_range(N):
            stream = tl.load(streams + (token * N + j) * D + channels, mask=inside, other=0.0).to(tl.float32)
            value += stream * tl.load(comb + (token * N + j) * N + k)
        tl.store(out + (token * N + k) * D + channels, value.to(out.dtype.element_ty), mask=inside)
