"""Rotary positions on the last R channels, in interleaved pairs (report 2.3.3).

Pair k holds channels (2k, 2k + 1) of the rotated tail and turns by position * frequency_k:

    (a, b) -> (a cos - b sin, a sin + b cos)

The inverse turns back by the same angle; it undoes, on the attention output, the positions that the
shared key-value vectors carry. Amplitude is always 1: this model has no YaRN mscale.
"""

from __future__ import annotations

import math

import torch

from dsv4.ops.backend import Backend, pick, triton_kernel
from dsv4.ops.compiled import compiled
from dsv4.ops.lowbit import round_entries
from dsv4.ops.rmsnorm import rmsnorm
from dsv4.ops.rope import native, portable, reference
from dsv4.ops.shapes import Shapes


def frequencies(
    rotary_dims: int,
    theta: float,
    *,
    factor: float = 1.0,
    original_context: float = 1.0,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
) -> torch.Tensor:
    """Return the angle per position of each pair, [R / 2] float32 on the CPU.

    ``factor`` above 1 applies YaRN: pairs that turn more than ``beta_fast`` times within
    ``original_context`` keep their frequency, those that turn less than ``beta_slow`` times have it
    divided by ``factor``, and a linear ramp over the pair index joins them.
    """
    exponent = torch.arange(0, rotary_dims, 2, dtype=torch.float32) / rotary_dims
    plain = 1.0 / (theta**exponent)  # [R / 2]
    if factor == 1.0:
        return plain

    def pair_that_turns(rotations: float) -> float:
        return rotary_dims * math.log(original_context / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(beta_slow)), rotary_dims - 1)
    span = high - low if high != low else 0.001
    ramp = ((torch.arange(rotary_dims // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    return plain / factor * ramp + plain * (1 - ramp)


def angles(
    positions: torch.Tensor, frequency: torch.Tensor, *, backend: Backend = "portable"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cosine and sine of position * frequency.

    positions: [B, T] integers; frequency: [R / 2] float32; returns two of [B, T, R / 2] float32.
    The product is formed in float32, as the released code does. ``native`` gives a position the same bits whatever
    stands beside it, which torch's own functions do not.
    """
    if backend == "native" and frequency.device.type == "cpu":
        return native.angles(positions, frequency)
    angle = positions.float()[..., None] * frequency  # [B, T, R / 2]
    return angle.cos(), angle.sin()


def rotate(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    inverse: bool = False,
    backend: Backend = "portable",
) -> torch.Tensor:
    """Rotate the last R channels of ``x``.

    x: [B, T, K] or [B, T, H, K] float; cos, sin: [B, T, R / 2] float32; returns the shape and dtype of x.
    """
    shapes = Shapes()
    shapes.check("cos", cos, "B T r")
    shapes.check("sin", sin, "B T r")
    shapes.check("x", x, "B T K" if x.dim() == 3 else "B T H K")
    _check_channels(x, cos)
    if x.dim() == 4:
        cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)  # [B, T, 1, R / 2]
    return pick(
        backend, reference=reference.rotate, portable=portable.rotate, native=native.rotate, triton="rope.triton:rotate"
    )(x, cos, sin, inverse)


def rotate_unit(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float, *, backend: Backend = "portable"
) -> torch.Tensor:
    """RMS-normalise each head over all its channels, without a weight, then rotate: the query's path.

    x: [B, T, H, K] float; cos, sin: [B, T, R / 2] float32; returns the shape and dtype of x.
    """
    shapes = Shapes()
    shapes.check("x", x, "B T H K")
    shapes.check("cos", cos, "B T r")
    shapes.check("sin", sin, "B T r")
    _check_channels(x, cos)
    chosen = pick(
        backend,
        reference=reference.rotate_unit,
        portable=portable.rotate_unit,
        native=native.rotate_unit,
        compiled=compiled(reference.rotate_unit, channels=2),
        triton="rope.triton:rotate_unit",
    )
    return chosen(x, cos.unsqueeze(2), sin.unsqueeze(2), eps)


def rotate_normed(
    x: torch.Tensor,
    weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    *,
    rounds: bool = False,
    backend: Backend = "portable",
) -> torch.Tensor:
    """RMS-normalise each token with weight [K], then rotate, and with ``rounds`` round as released: the key's path.

    x: [B, T, K] float; cos, sin: [B, T, R / 2] float32; returns the shape and dtype of x, to which each step rounds.
    ``rmsnorm``, ``rotate`` and ``lowbit.round_entries`` one after the other, in one kernel where there is one.
    """
    shapes = Shapes()
    shapes.check("x", x, "B T K")
    shapes.check("weight", weight, "K")
    shapes.check("cos", cos, "B T r")
    shapes.check("sin", sin, "B T r")
    _check_channels(x, cos)
    kernel = triton_kernel(backend, "rope.triton:rotate_normed")
    if kernel is not None and torch.float64 not in (x.dtype, weight.dtype, cos.dtype):
        return kernel(x, weight, cos, sin, eps, rounds)
    turned = rotate(rmsnorm(x, weight, eps, backend=backend), cos, sin, backend=backend)
    return round_entries(turned, 2 * cos.shape[-1], backend=backend) if rounds else turned


def _check_channels(x: torch.Tensor, cos: torch.Tensor) -> None:
    if 2 * cos.shape[-1] > x.shape[-1]:
        raise ValueError(f"cos rotates {2 * cos.shape[-1]} channels; expected at most the {x.shape[-1]} of x")
