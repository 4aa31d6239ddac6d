"""The gradients of the hyper-connections' kernels: two passes over the streams for reading, one for writing."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dsv4.ops.mhc.portable import split_scale
from dsv4.ops.mhc.triton_parts import normalised, read_weight, scaled, softmax, sum_of_streams, tiles, total, warps


def pre(
    streams: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    norm_weight: torch.Tensor,
    mixes: torch.Tensor,
    inverse_rms: torch.Tensor,
    norm_eps: float,
    eps: float,
    iterations: int,
    grad_x: torch.Tensor | None,
    grad_post: torch.Tensor | None,
    grad_comb: torch.Tensor | None,
    grad_carried: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """Gradients of streams, fn, base, scale and norm weight from those of what reading returned."""
    T, N, D = streams.shape
    M, c = len(fn), tiles(streams.dtype)
    grad_x, grad_post, grad_comb, grad_carried = (
        None if grad is None else grad.contiguous() for grad in (grad_x, grad_post, grad_comb, grad_carried)
    )
    grad_logits, along = fn.new_empty(T, M), fn.new_empty(T)
    narrow = streams.new_empty(T, M)  # the two large products of backward run in the dtype of the streams
    grad_streams = torch.empty_like(streams)
    sums = fn.new_empty(0 if grad_x is None else triton.cdiv(T, c.tokens_of_a_sum), D)
    grad_read = norms = None
    if T and D:
        if grad_x is not None:
            grad_read, norms = fn.new_empty(T, N), fn.new_empty(T, 2)
            _read_backward[(len(sums),)](
                streams, mixes, base, scale, norm_weight, grad_x, grad_read, norms, sums, T, norm_eps, eps,
                N=N, M=M, D=D, BLOCK=triton.next_power_of_2(D), TOKENS=c.tokens_of_a_sum, num_warps=warps(D),
            )  # fmt: skip
        rounds = fn.new_empty(T, 2 * iterations, N, N) if grad_comb is not None else None
        _coefficients_backward[(triton.cdiv(T, c.tokens_of_coefficients),)](
            mixes, inverse_rms, base, scale, grad_read, grad_post, grad_comb, rounds, grad_logits, narrow, along,
            T, eps,
            N=N, P=triton.next_power_of_2(N), M=M, SIZE=N * D, ITERATIONS=iterations, TOKENS=c.tokens_of_coefficients,
            num_warps=1,
        )  # fmt: skip
        block = min(max(triton.next_power_of_2(D), 16), c.channels_of_streams)
        _streams_backward[(triton.cdiv(T, c.tokens_of_streams), triton.cdiv(D, block))](
            streams, fn, mixes, base, scale, norm_weight, grad_x, norms, grad_carried, narrow, along, grad_streams, T,
            eps, N=N, M=M, D=D, ROWS=max(triton.next_power_of_2(M), 16), BLOCK=block, TOKENS=c.tokens_of_streams,
            num_warps=4,
        )  # fmt: skip
    # A plain product over all tokens, [M, T] by [T, N D]: its shape is the library's own ground.
    grad_fn = torch.mm(narrow.T, streams.flatten(1)).to(fn.dtype)
    grad_scale = (grad_logits * mixes).sum(dim=0)  # [M]
    grad_scale = torch.stack([part.sum() for part in grad_scale.split(split_scale(scale, N))])
    return grad_streams, grad_fn, grad_logits.sum(dim=0), grad_scale, sums.sum(dim=0).to(norm_weight.dtype)


def post(
    streams: torch.Tensor, y: torch.Tensor, post_weights: torch.Tensor, comb: torch.Tensor, grad: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Gradients of all four that writing takes."""
    T, N, D = streams.shape
    given = streams, y, post_weights, comb
    grads = tuple(torch.empty_like(x) if D else torch.zeros_like(x) for x in given)
    if T and D:
        block = triton.next_power_of_2(D)
        _write_backward[(T,)](*given, grad.contiguous(), *grads, N=N, D=D, BLOCK=block, num_warps=warps(D))
    return grads


def sinkhorn(grad: torch.Tensor, logits: torch.Tensor, eps: float, iterations: int) -> torch.Tensor:
    """Gradient of the logits [T, N, N]."""
    T, N, _ = logits.shape
    grad_logits = torch.empty_like(logits)
    if logits.numel():
        tokens = tiles(logits.dtype).tokens_of_coefficients
        _sinkhorn_backward[(triton.cdiv(T, tokens),)](
            grad.contiguous(), logits, logits.new_empty(T, 2 * iterations, N, N), grad_logits, T, eps,
            N=N, P=triton.next_power_of_2(N), ITERATIONS=iterations, TOKENS=tokens, num_warps=1,
        )  # fmt: skip
    return grad_logits


@triton.jit(do_not_specialize=["num_tokens"])
def _read_backward(
    streams, mixes, base, scale, norm_weight, grad_x, grad_read, norms, sums, num_tokens, norm_eps, eps,
    N: tl.constexpr, M: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Through the norm to the N products of the gradient of u with the streams, and to a partial sum for its weight.

    norms: inverse RMS of u and the gradient's part along it; with them the gradient of u needs no memory of its own.
    """
    program = tl.program_id(0).to(tl.int64)
    channels = tl.arange(0, BLOCK)
    weight = tl.load(norm_weight + channels, mask=channels < D, other=0.0).to(tl.float32)
    grad_weight = tl.zeros([BLOCK], dtype=tl.float32)
    for t in range(TOKENS):
        is_token = program * TOKENS + t < num_tokens
        token = tl.minimum(program * TOKENS + t, num_tokens - 1)
        inside = channels < tl.where(is_token, D, 0)
        of_token = streams + token * N * D
        u = sum_of_streams(of_token, channels, mixes + token * M, base, scale, eps, inside, N, D)
        inverse = tl.rsqrt(tl.sum(u * u, axis=0) / D + norm_eps)
        normed = u * inverse
        coming = tl.load(grad_x + token * D + channels, mask=inside, other=0.0).to(tl.float32)
        grad_weight += coming * normed
        coming = coming * weight
        along = tl.sum(coming * normed, axis=0) / D
        grad_u = (coming - normed * along) * inverse
        tl.store(norms + token * 2, inverse, mask=is_token)
        tl.store(norms + token * 2 + 1, along, mask=is_token)
        for j in tl.static_range(N):
            stream = tl.load(of_token + j * D + channels, mask=inside, other=0.0).to(tl.float32)
            tl.store(grad_read + token * N + j, tl.sum(stream * grad_u, axis=0), mask=is_token)
    tl.store(sums + program * D + channels, grad_weight, mask=channels < D)


@triton.jit(do_not_specialize=["num_tokens"])
def _coefficients_backward(
    mixes, inverse_rms, base, scale, grad_read, grad_post, grad_comb, rounds, grad_logits, narrow, along, num_tokens,
    eps, N: tl.constexpr, P: tl.constexpr, M: tl.constexpr, SIZE: tl.constexpr, ITERATIONS: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """From the gradients of the weights to those of the mixes: narrow is theirs times r, along what r itself carries.

    mixes = r fn.x with r = 1 / rms: the streams enter through the product and through r.
    """
    tokens = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    is_token = tokens < num_tokens
    i = tl.arange(0, P)
    is_row = (i < N)[None, :]
    inside = is_token[:, None] & is_row
    inverse = tl.load(inverse_rms + tokens, mask=is_token, other=0.0)
    product = tl.zeros([TOKENS], dtype=tl.float32)

    at = tokens[:, None] * M + i[None, :]
    grad = tl.zeros([TOKENS, P], dtype=tl.float32)
    mix = tl.load(mixes + at, mask=inside, other=0.0)
    if grad_read is not None:
        gate = tl.sigmoid(scaled(mix, base + i[None, :], scale, is_row))
        coming = tl.load(grad_read + tokens[:, None] * N + i[None, :], mask=inside, other=0.0)
        grad = coming * gate * (1 - gate)
    tl.store(grad_logits + at, grad, mask=inside)
    grad = grad * tl.load(scale)
    product += tl.sum(grad * mix, axis=1)
    tl.store(narrow + at, (grad * inverse[:, None]).to(narrow.dtype.element_ty), mask=inside)

    if ITERATIONS > 0:
        at = at + N
        grad = tl.zeros([TOKENS, P], dtype=tl.float32)
        mix = tl.load(mixes + at, mask=inside, other=0.0)
        if grad_post is not None:
            gate = tl.sigmoid(scaled(mix, base + N + i[None, :], scale + 1, is_row))
            coming = tl.load(grad_post + tokens[:, None] * N + i[None, :], mask=inside, other=0.0)
            grad = 2 * coming * gate * (1 - gate)
        tl.store(grad_logits + at, grad, mask=inside)
        grad = grad * tl.load(scale + 1)
        product += tl.sum(grad * mix, axis=1)
        tl.store(narrow + at, (grad * inverse[:, None]).to(narrow.dtype.element_ty), mask=inside)

        place = i[None, :, None] * N + i[None, None, :]
        is_place = (i < N)[None, :, None] & (i < N)[None, None, :]
        of_token = tokens[:, None, None]
        is_square = is_token[:, None, None] & is_place
        at_square = of_token * M + 2 * N + place
        grad_square = tl.zeros([TOKENS, P, P], dtype=tl.float32)
        mix_square = tl.load(mixes + at_square, mask=is_square, other=0.0)
        if grad_comb is not None:
            logits = scaled(mix_square, base + 2 * N + place, scale + 2, is_place)
            coming = tl.load(grad_comb + of_token * (N * N) + place, mask=is_square, other=0.0)
            kept = rounds + of_token * (2 * ITERATIONS * N * N) + place
            grad_square = _through_rounds(coming, logits, kept, is_place, is_square, eps, N, ITERATIONS)
        tl.store(grad_logits + at_square, grad_square, mask=is_square)
        grad_square = grad_square * tl.load(scale + 2)
        product += tl.sum(tl.sum(grad_square * mix_square, axis=2), axis=1)
        grad_square = grad_square * inverse[:, None, None]
        tl.store(narrow + at_square, grad_square.to(narrow.dtype.element_ty), mask=is_square)
    tl.store(along + tokens, product * inverse * inverse / -SIZE, mask=is_token)


@triton.jit
def _through_rounds(grad, logits, kept, is_place, inside, eps, N: tl.constexpr, ITERATIONS: tl.constexpr):
    """Form the rounds again, each half of one into its place in ``kept``, and go back through them."""
    bare = softmax(logits, is_place)
    comb = tl.where(is_place, bare + eps, 0.0)
    tl.store(kept, comb, mask=inside)
    comb = normalised(comb, is_place, eps, 1)
    tl.store(kept + N * N, comb, mask=inside)
    for half in range(2, 2 * ITERATIONS, 2):
        comb = normalised(comb, is_place, eps, 2)
        tl.store(kept + half * N * N, comb, mask=inside)
        comb = normalised(comb, is_place, eps, 1)
        tl.store(kept + (half + 1) * N * N, comb, mask=inside)
    tl.debug_barrier()  # what one thread stored another may load
    for back in range(2, 2 * ITERATIONS, 2):
        half = 2 * ITERATIONS - back
        rows = tl.load(kept + half * N * N, mask=inside, other=0.0)
        before = tl.load(kept + (half - 1) * N * N, mask=inside, other=0.0)
        grad = _through(grad, comb, rows, is_place, eps, 1)
        grad = _through(grad, rows, before, is_place, eps, 2)
        comb = before
    grad = _through(grad, comb, tl.where(is_place, bare + eps, 0.0), is_place, eps, 1)
    return bare * (grad - tl.sum(grad * bare, axis=2)[:, :, None])


@triton.jit
def _through(grad, after, before, is_place, eps, AXIS: tl.constexpr):
    """Back through one division by sums over an axis."""
    along = tl.expand_dims(tl.sum(grad * after, axis=AXIS), AXIS)
    return tl.where(is_place, (grad - along) / total(before, is_place, eps, AXIS), 0.0)


@triton.jit(do_not_specialize=["num_tokens"])
def _sinkhorn_backward(
    grad, logits, rounds, grad_logits, num_tokens, eps,
    N: tl.constexpr, P: tl.constexpr, ITERATIONS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    tokens = (tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS))[:, None, None]
    i = tl.arange(0, P)
    place = i[None, :, None] * N + i[None, None, :]
    is_place = (i < N)[None, :, None] & (i < N)[None, None, :]
    inside = (tokens < num_tokens) & is_place
    coming = tl.load(grad + tokens * (N * N) + place, mask=inside, other=0.0)
    given = tl.load(logits + tokens * (N * N) + place, mask=inside, other=0.0)
    kept = rounds + tokens * (2 * ITERATIONS * N * N) + place
    value = _through_rounds(coming, given, kept, is_place, inside, eps, N, ITERATIONS)
    tl.store(grad_logits + tokens * (N * N) + place, value, mask=inside)


@triton.jit(do_not_specialize=["num_tokens"])
def _streams_backward(
    streams, fn, mixes, base, scale, norm_weight, grad_x, norms, grad_carried, narrow, along, grad_streams, num_tokens,
    eps, N: tl.constexpr, M: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """Some channels of a block of tokens, all four parts of the streams' gradient at once."""
    tokens = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    rows = tl.arange(0, ROWS)
    is_token, is_channel, is_row = tokens < num_tokens, channels < D, rows < M
    inside = is_token[:, None] & is_channel[None, :]
    of_token = tokens[:, None] * (N * D) + channels[None, :]
    of_rows = is_token[:, None] & is_row[None, :]
    grad_mixes = tl.load(narrow + tokens[:, None] * M + rows[None, :], mask=of_rows, other=0.0)
    through_rms = tl.load(along + tokens, mask=is_token, other=0.0)[:, None]
    grad_u = tl.zeros([TOKENS, BLOCK], dtype=tl.float32)
    if grad_x is not None:
        u = tl.zeros([TOKENS, BLOCK], dtype=tl.float32)
        for j in tl.static_range(N):
            weight = read_weight(tl.load(mixes + tokens * M + j, mask=is_token, other=0.0), base + j, scale, eps)
            u += tl.load(streams + of_token + j * D, mask=inside, other=0.0).to(tl.float32) * weight[:, None]
        u = u.to(streams.dtype.element_ty).to(tl.float32)
        inverse = tl.load(norms + tokens * 2, mask=is_token, other=0.0)[:, None]
        of_norm = tl.load(norms + tokens * 2 + 1, mask=is_token, other=0.0)[:, None]
        of_weight = tl.load(norm_weight + channels, mask=is_channel, other=0.0).to(tl.float32)[None, :]
        coming = tl.load(grad_x + tokens[:, None] * D + channels[None, :], mask=inside, other=0.0).to(tl.float32)
        grad_u = (coming * of_weight - u * inverse * of_norm) * inverse
    for j in tl.static_range(N):
        at = rows[:, None] * (N * D) + j * D + channels[None, :]
        w = tl.load(fn + at, mask=is_row[:, None] & is_channel[None, :], other=0.0).to(narrow.dtype.element_ty)
        value = tl.dot(grad_mixes, w, input_precision="ieee")
        value += tl.load(streams + of_token + j * D, mask=inside, other=0.0).to(tl.float32) * through_rms
        if grad_x is not None:
            mix = tl.load(mixes + tokens * M + j, mask=is_token, other=0.0)
            value += grad_u * read_weight(mix, base + j, scale, eps)[:, None]
        if grad_carried is not None:
            value += tl.load(grad_carried + of_token + j * D, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_streams + of_token + j * D, value.to(grad_streams.dtype.element_ty), mask=inside)


@triton.jit
def _write_backward(
    streams, y, post_weights, comb, grad, grad_streams, grad_y, grad_post, grad_comb,
    N: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """All channels of one token, each sum of products taken in registers; the N gradients come again from the cache."""
    token = tl.program_id(0).to(tl.int64)
    channels = tl.arange(0, BLOCK)
    inside = channels < D
    of_token = token * N * D + channels
    written = tl.load(y + token * D + channels, mask=inside, other=0.0).to(tl.float32)
    value = tl.zeros([BLOCK], dtype=tl.float32)
    for k in tl.static_range(N):
        coming = tl.load(grad + of_token + k * D, mask=inside, other=0.0).to(tl.float32)
        value += coming * tl.load(post_weights + token * N + k)
        tl.store(grad_post + token * N + k, tl.sum(coming * written, axis=0))
    tl.store(grad_y + token * D + channels, value.to(grad_y.dtype.element_ty), mask=inside)
    for j in tl.static_range(N):
        stream = tl.load(streams + of_token + j * D, mask=inside, other=0.0).to(tl.float32)
        value = tl.zeros([BLOCK], dtype=tl.float32)
        for k in tl.static_range(N):
            coming = tl.load(grad + of_token + k * D, mask=inside, other=0.0).to(tl.float32)
            value += coming * tl.load(comb + (token * N + j) * N + k)
            tl.store(grad_comb + (token * N + j) * N + k, tl.sum(stream * coming, axis=0))
        tl.store(grad_streams + of_token + j * D, value.to(grad_streams.dtype.element_ty), mask=inside)
