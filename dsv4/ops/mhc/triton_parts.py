"""What the kernels of the hyper-connections share: sizes of tiles, and pieces of the formulas."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Sizes of the launches; none depends on how many tokens there are.

    tokens, channels, parts, warps and stages: of the projection; a part is a fixed share of the channels of a token.
    channels_ahead and stages_ahead: of that by the kernel that writes. tokens_of_coefficients: one warp each.
    channels_of_a_write: of one token, forward. tokens_of_streams and channels_of_streams: of the gradient of the
    streams. tokens_of_a_sum: of a partial gradient of the norm's weight.
    """

    tokens: int
    channels: int
    channels_ahead: int
    warps: int
    stages: int
    stages_ahead: int
    parts: int = 8
    tokens_of_coefficients: int = 16
    channels_of_a_write: int = 1024
    tokens_of_streams: int = 32
    channels_of_streams: int = 128
    tokens_of_a_sum: int = 8


CONFIGS = {
    # With 128 tokens fn is a quarter of what a program reads, from the second-level cache. A program that also writes
    # holds all streams of its channels in registers.
    "wide": Tiles(tokens=128, channels=64, channels_ahead=32, warps=8, stages=3, stages_ahead=2),
    "deep": Tiles(tokens=128, channels=32, channels_ahead=32, warps=8, stages=4, stages_ahead=1),
    # float32 products run on the plain units.
    "float32": Tiles(tokens=32, channels=64, channels_ahead=64, warps=4, stages=3, stages_ahead=2),
}
NARROW = "wide"  # the one for 16-bit dtypes


def tiles(dtype: torch.dtype) -> Tiles:
    """The sizes for streams of a dtype."""
    return CONFIGS["float32" if dtype == torch.float32 else NARROW]


def warps(D: int) -> int:
    """Warps of a program that holds all D channels of a token."""
    return 4 if D <= 2048 else 8 if D <= 4096 else 16


@triton.jit
def scaled(mixes, base, scale, mask):
    """The affine map of mixes: base points at theirs, scale at the number of their kind."""
    return mixes * tl.load(scale) + tl.load(base, mask=mask, other=0.0)


@triton.jit
def total(comb, is_place, eps, AXIS: tl.constexpr):
    """What a half-round divides by: sums over an axis plus eps, and 1 beyond the N rows and columns."""
    return tl.where(is_place, tl.expand_dims(tl.sum(comb, axis=AXIS), AXIS) + eps, 1.0)


@triton.jit
def normalised(comb, is_place, eps, AXIS: tl.constexpr):
    return comb / total(comb, is_place, eps, AXIS)


@triton.jit
def softmax(logits, is_place):
    """Over the rows of [TOKENS, P, P], 0 beyond the N rows and columns."""
    logits = tl.where(is_place, logits, float("-inf"))
    # A row beyond N is all -inf; the bounds are for it alone.
    value = tl.exp(logits - tl.maximum(tl.max(logits, axis=2), -1e38)[:, :, None])
    return value / tl.maximum(tl.sum(value, axis=2), 1e-30)[:, :, None]


@triton.jit
def doubly_stochastic(logits, is_place, eps, ITERATIONS: tl.constexpr):
    """Softmax over rows, plus eps; columns; then rows and columns ``ITERATIONS`` - 1 times: [TOKENS, P, P]."""
    comb = tl.where(is_place, softmax(logits, is_place) + eps, 0.0)
    comb = normalised(comb, is_place, eps, 1)
    for _ in range(ITERATIONS - 1):
        comb = normalised(comb, is_place, eps, 2)
        comb = normalised(comb, is_place, eps, 1)
    return comb


@triton.jit
def read_weight(mix, base, scale, eps):
    """What multiplies a stream in the read, from its mix; base points at its own."""
    return tl.sigmoid(mix * tl.load(scale) + tl.load(base)) + eps


@triton.jit
def sum_of_streams(streams, channels, mixes, base, scale, eps, inside, N: tl.constexpr, D: tl.constexpr):
    """sum_j pre_j X_j of one token, rounded to the dtype of the streams and back."""
    u = tl.load(streams + channels, mask=inside, other=0.0).to(tl.float32) * read_weight(
        tl.load(mixes), base, scale, eps
    )
    for j in tl.static_range(1, N):
        weight = read_weight(tl.load(mixes + j), base + j, scale, eps)
        u += tl.load(streams + j * D + channels, mask=inside, other=0.0).to(tl.float32) * weight
    return u.to(streams.dtype.element_ty).to(tl.float32)
