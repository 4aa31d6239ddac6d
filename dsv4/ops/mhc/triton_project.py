"""The map fn of the hyper-connections over streams, by parts: products and square sums of a block of tokens.

Alone, or by the kernel that writes the streams, on what it holds in registers. ``triton.py`` says what becomes of it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dsv4.ops.mhc.triton_parts import Tiles


def sizes(c: Tiles, M: int, N: int, D: int, channels: int) -> dict[str, int]:
    """The constants and warps of a projection, so many channels at a time."""
    part = triton.cdiv(triton.cdiv(D, c.parts), channels) * channels
    return {
        "M": M, "N": N, "D": D, "PART": part, "PARTS": c.parts, "TOKENS": c.tokens,
        "ROWS": max(triton.next_power_of_2(M), 16), "CHANNELS": channels, "num_warps": c.warps,
    }  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens"])
def project(
    streams, fn, partial, num_tokens,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr, TOKENS: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One part of a block of tokens: M products with fn, and in column M the sum of squares.

    A part is some channels of all streams, as a kernel that writes them has them; streams alternate.
    """
    tokens = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    part = tl.program_id(1)
    rows, channels = tl.arange(0, ROWS), tl.arange(0, CHANNELS)
    is_token, is_row = tokens < num_tokens, rows < M
    products = tl.zeros([TOKENS, ROWS], dtype=tl.float32)
    squares = tl.zeros([TOKENS, CHANNELS], dtype=tl.float32)
    for step in tl.range(
        PART // CHANNELS * N, num_stages=STAGES
    ):  # one loop over channels and streams: it is pipelined
        channel = part * PART + step // N * CHANNELS + channels
        at = step % N * D + channel
        of_x, of_w = tokens[:, None] * (N * D) + at[None, :], rows[:, None] * (N * D) + at[None, :]
        x = tl.load(streams + of_x, mask=is_token[:, None] & (channel < D)[None, :], other=0.0)
        w = tl.load(fn + of_w, mask=is_row[:, None] & (channel < D)[None, :], other=0.0)
        squares += x.to(tl.float32) * x.to(tl.float32)
        products = _multiply(x, w, products)
    _store_partial(products, squares, partial, tokens, part, is_token, M, PARTS, ROWS)


@triton.jit
def _multiply(x, w, products):
    """products [t, m] and those of x [t, c] with w [m, c] float32.

    A number of 16 bits is one that tensor cores take as it is, and a weight is the sum of three of them, with all of
    its 24 digits.
    """
    if x.dtype == tl.float32:
        products = tl.dot(x, tl.trans(w), products, input_precision="ieee")
    else:
        for _ in tl.static_range(3):
            digits = w.to(x.dtype)
            products = tl.dot(x, tl.trans(digits), products)
            w -= digits.to(tl.float32)
    return products


@triton.jit
def _store_partial(
    products, squares, partial, tokens, part, is_token, M: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr
):
    rows = tl.arange(0, ROWS)
    to = partial + (tokens * PARTS + part) * (M + 1)
    tl.store(to[:, None] + rows[None, :], products, mask=is_token[:, None] & (rows < M)[None, :])
    tl.store(to + M, tl.sum(squares, axis=1), mask=is_token)


@triton.jit(do_not_specialize=["num_tokens"])
def write_project(
    streams, y, post_weights, comb, fn, out, partial, num_tokens,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr, TOKENS: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``_write`` and ``project``, some channels of a block of tokens at a time, step by step as these do."""
    tokens = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    part = tl.program_id(1)
    rows, channels = tl.arange(0, ROWS), tl.arange(0, CHANNELS)
    is_token, is_row = tokens < num_tokens, rows < M
    products = tl.zeros([TOKENS, ROWS], dtype=tl.float32)
    squares = tl.zeros([TOKENS, CHANNELS], dtype=tl.float32)
    for step in tl.range(PART // CHANNELS, num_stages=STAGES):
        channel = part * PART + step * CHANNELS + channels
        inside = is_token[:, None] & (channel < D)[None, :]
        of_token = tokens[:, None] * (N * D) + channel[None, :]
        written = tl.load(y + tokens[:, None] * D + channel[None, :], mask=inside, other=0.0)
        given = ()
        for j in tl.static_range(N):
            given = given + (tl.load(streams + of_token + j * D, mask=inside, other=0.0),)  # noqa: RUF005
        for k in tl.static_range(N):
            post = tl.load(post_weights + tokens * N + k, mask=is_token, other=0.0)
            value = written.to(tl.float32) * post[:, None]
            for j in tl.static_range(N):
                weight = tl.load(comb + (tokens * N + j) * N + k, mask=is_token, other=0.0)
                value += given[j].to(tl.float32) * weight[:, None]
            x = value.to(out.dtype.element_ty)
            tl.store(out + of_token + k * D, x, mask=inside)
            of_w = rows[:, None] * (N * D) + (k * D + channel)[None, :]
            w = tl.load(fn + of_w, mask=is_row[:, None] & (channel < D)[None, :], other=0.0)
            squares += x.to(tl.float32) * x.to(tl.float32)
            products = _multiply(x, w, products)
    _store_partial(products, squares, partial, tokens, part, is_token, M, PARTS, ROWS)
