"""Manifold-constrained hyper-connections (report 2.2): N residual streams around each sub-layer.

From the RMS-normalised streams a linear map gives, per token, three sets of coefficients:

    pre [N]      sigmoid + eps      the sub-layer reads     u   = sum_j pre_j X_j
    post [N]     2 sigmoid          and its output y enters X'_k = post_k y + sum_j comb_jk X_j
    comb [N, N]  Sinkhorn           a nearly doubly stochastic mix of the streams

The sum over j uses comb's *first* index: the matrix applied to the streams is comb transposed (the
report's B is our comb transposed). Coefficients are float32 whatever the streams' dtype.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from dsv4.ops.backend import Backend, pick, triton_kernel
from dsv4.ops.mhc import native, portable, reference
from dsv4.ops.recompute import Recomputed
from dsv4.ops.shapes import Shapes


class Mix(NamedTuple):
    """Parameters of one mix: fn [M, N * D], base [M], scale [3] or [1], all float32.

    M = N (2 + N) rows around a sub-layer: pre, post, then comb row by row. M = N at the head: pre alone.
    """

    fn: torch.Tensor
    base: torch.Tensor
    scale: torch.Tensor


class Reading(NamedTuple):
    """What a sub-layer takes from the streams, and what ``post`` needs to write its output back.

    x: [B, T, D], the normalised input of the sub-layer, in the dtype of the streams. post: [B, T, N] and
    comb: [B, T, N, N], float32. streams: the streams themselves; ``post`` takes them from here, so that one
    backward pass adds up both of their gradients. again: how backward forms the streams, if they are not kept.
    """

    x: torch.Tensor
    post: torch.Tensor
    comb: torch.Tensor
    streams: torch.Tensor
    again: Recomputed | None = None


def pre(
    streams: torch.Tensor,
    mix: Mix,
    norm_weight: torch.Tensor,
    *,
    norm_eps: float,
    eps: float,
    iterations: int,
    backend: Backend = "portable",
) -> Reading:
    """Read a sub-layer's input off the streams, [B, T, N, D], and RMS-normalise it with norm_weight [D]."""
    shapes = Shapes()
    shapes.check("streams", streams, "B T N D")
    N, D = streams.shape[2:]
    _check_mix(shapes, mix, norm_weight, N, D, iterations)
    chosen = pick(backend, reference=reference.pre, portable=portable.pre, native=native.pre, triton="mhc.triton:pre")
    return Reading(*chosen(streams, mix.fn, mix.base, mix.scale, norm_weight, norm_eps, eps, iterations))


def post(reading: Reading, y: torch.Tensor, *, backend: Backend = "portable") -> torch.Tensor:
    """Write the sub-layer's output y [B, T, D] back: X'_k = post_k y + sum_j comb_jk X_j.

    Returns [B, T, N, D] in the dtype of the streams, summed in float32.
    """
    shapes = Shapes()
    shapes.check("reading.streams", reading.streams, "B T N D")
    shapes.check("y", y, "B T D")
    shapes.check("reading.post", reading.post, "B T N")
    shapes.check("reading.comb", reading.comb, "B T N N")
    chosen = pick(
        backend, reference=reference.post, portable=portable.post, native=native.post, triton="mhc.triton:post"
    )
    given = reading.streams, y, reading.post, reading.comb
    if reading.again is None:
        return chosen(*given)
    with reading.again.instead_of(reading.streams):
        return chosen(*given)


def write_read(
    reading: Reading,
    y: torch.Tensor,
    mix: Mix,
    norm_weight: torch.Tensor,
    *,
    norm_eps: float,
    eps: float,
    iterations: int,
    backend: Backend = "portable",
) -> Reading:
    """Write the sub-layer's output back, as ``post``, and read the input of the next one off what that gives.

    As ``pre`` of ``post``, in values and gradients; the streams in the result are those that ``post`` returns. They
    are not kept for backward, here or by the ``post`` of the result: one small mix forms them again, for both.
    """
    shapes = Shapes()
    shapes.check("reading.streams", reading.streams, "B T N D")
    N, D = reading.streams.shape[2:]
    shapes.check("y", y, "B T D")
    shapes.check("reading.post", reading.post, "B T N")
    shapes.check("reading.comb", reading.comb, "B T N N")
    _check_mix(shapes, mix, norm_weight, N, D, iterations)
    numbers = {"norm_eps": norm_eps, "eps": eps, "iterations": iterations}
    again = Recomputed(lambda: post(reading, y, backend=backend))
    kernel = triton_kernel(backend, "mhc.triton:write_read")
    if kernel is None:
        written = post(reading, y, backend=backend)
        with again.instead_of(written):
            read = pre(written, mix, norm_weight, **numbers, backend=backend)
    else:
        given = (reading.streams, y, reading.post, reading.comb, mix.fn, mix.base, mix.scale, norm_weight)
        read = Reading(*kernel(*given, **numbers, keep=again.instead_of))
    return read._replace(again=again)


def head(
    streams: torch.Tensor,
    mix: Mix,
    norm_weight: torch.Tensor,
    *,
    norm_eps: float,
    eps: float,
    backend: Backend = "portable",
) -> torch.Tensor:
    """Fold the streams into one after the last layer, sum_j pre_j X_j, and normalise: [B, T, D]."""
    shapes = Shapes()
    shapes.check("streams", streams, "B T N D")
    N, D = streams.shape[2:]
    shapes.check("mix.fn", mix.fn, f"{N} {N * D}")
    shapes.check("mix.base", mix.base, f"{N}")
    shapes.check("mix.scale", mix.scale, "1")
    shapes.check("norm_weight", norm_weight, "D")
    chosen = pick(
        backend, reference=reference.head, portable=portable.head, native=native.head, triton="mhc.triton:head"
    )
    return chosen(streams, mix.fn, mix.base, mix.scale, norm_weight, norm_eps, eps)


def sinkhorn(logits: torch.Tensor, *, eps: float, iterations: int, backend: Backend = "portable") -> torch.Tensor:
    """Project logits [..., N, N] float32 towards the doubly stochastic matrices.

    Softmax over each row, plus eps; divide by column sums plus eps; then ``iterations`` - 1 times rows and
    columns again. After a few rounds column sums are 1; row sums
    approach it.
    """
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}; expected at least 1")
    if logits.dim() < 2 or logits.shape[-1] != logits.shape[-2]:
        raise ValueError(f"logits has shape {list(logits.shape)}; expected [..., N, N]")
    return pick(
        backend,
        reference=reference.sinkhorn,
        portable=portable.sinkhorn,
        native=native.sinkhorn,
        triton="mhc.triton:sinkhorn",
    )(logits, eps, iterations)


def _check_mix(shapes: Shapes, mix: Mix, norm_weight: torch.Tensor, N: int, D: int, iterations: int) -> None:
    """Check the mix around a sub-layer."""
    shapes.check("mix.fn", mix.fn, f"{N * (2 + N)} {N * D}")
    shapes.check("mix.base", mix.base, f"{N * (2 + N)}")
    shapes.check("mix.scale", mix.scale, "3")
    shapes.check("norm_weight", norm_weight, "D")
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}; expected at least 1")
