"""Numbers of few bits, as the released model rounds to them (report 3.4, spec 7).

    code(x) = the nearest of the code's values to x / s, ties to the even code, cut off at the largest
    s       = 2^ceil(log2(max(|x| of the group, floor) / largest))

    E4M3  largest 448, floor 1e-4        activations and cache rows, in groups of a row; weights, in blocks of 128 x 128
    E2M1  largest 6, floor 6 x 2^-126    expert weights, indexer queries and keys, in groups of 32 of a row

Scales are powers of two, E8M0 (one byte, 2^(byte - 127)), so a division by one loses nothing, and no value overflows.
Weights of the Base files have float32 scales instead, max / 448: there x / s and value x s round to float32. All is
computed in float32. What is rounded for training passes its gradient straight through, to where it came from: a
backward pass multiplies by the same rounded values, and nothing is rounded a second time along another axis.
Activations that are NaN stay NaN; E2M1 has none, so there its group is. Weights to be stored must be finite.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from dsv4.native import wants_gradient
from dsv4.ops.backend import Backend, pick
from dsv4.ops.hadamard import hadamard
from dsv4.ops.lowbit import native, portable, reference
from dsv4.ops.lowbit.packed import SCALE_DTYPES, Kind, Packed
from dsv4.ops.lowbit.tables import ACTIVATION_GROUP, BLOCK, CACHE_GROUP, FP4_GROUP
from dsv4.ops.shapes import check_floating

__all__ = [
    "ACTIVATION_GROUP",
    "BLOCK",
    "FP4_GROUP",
    "Kind",
    "Packed",
    "dequantise",
    "quantise_blocks",
    "quantise_fp4",
    "quantise_rows",
    "reblock",
    "round_blocks",
    "round_entries",
    "round_fp4",
    "round_index",
    "round_rows",
]


def quantise_rows(
    x: torch.Tensor, group: int = ACTIVATION_GROUP, *, backend: Backend = "portable"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return E4M3 codes [..., K] and E8M0 scales [..., ceil(K / group)], both uint8, of x [..., K] float.

    The last group of a row may be a shorter one.
    """
    _check_rows(x, group)
    run = pick(
        backend,
        reference=reference.quantise_rows,
        portable=portable.quantise_rows,
        native=native.quantise_rows,
        triton="lowbit.triton:quantise_rows",
    )
    return run(x.detach(), group)


def quantise_blocks(
    w: torch.Tensor, scale_dtype: torch.dtype = torch.uint8, *, backend: Backend = "portable"
) -> Packed:
    """Return w [..., O, I] float in E4M3, with scales of ``scale_dtype``: uint8 (E8M0) or float32.

    Blocks at the lower and right edge may be smaller.
    """
    _check_weight(w)
    _check_finite(w)
    if scale_dtype not in SCALE_DTYPES["fp8"]:
        raise ValueError(f"scale_dtype is {scale_dtype}; expected torch.uint8 or torch.float32")
    run = pick(
        backend,
        reference=reference.quantise_blocks,
        portable=portable.quantise_blocks,
        native=native.quantise_blocks,
        triton="lowbit.triton:quantise_blocks",
    )
    return Packed(*run(w.detach(), scale_dtype), "fp8")


def quantise_fp4(w: torch.Tensor, *, backend: Backend = "portable") -> Packed:
    """Return w [..., O, I] float in E2M1, I a multiple of 32."""
    _check_weight(w, FP4_GROUP)
    _check_finite(w)
    run = pick(
        backend,
        reference=reference.quantise_fp4,
        portable=portable.quantise_fp4,
        native=native.quantise_fp4,
        triton="lowbit.triton:quantise_fp4",
    )
    return Packed(*run(w.detach()), "fp4")


def dequantise(packed: Packed, dtype: torch.dtype, *, backend: Backend = "portable") -> torch.Tensor:
    """Return the values [..., O, I] of a packed matrix: exact in float32 (with E8M0 scales), then rounded to ``dtype``.

    Scales that are no number are refused.
    """
    packed.check_scales()
    run = pick(
        backend,
        reference=reference.dequantise,
        portable=portable.dequantise,
        native=native.dequantise,
        triton="lowbit.triton:dequantise",
    )
    return run(packed, dtype)


def reblock(packed: Packed, *, lossy: bool = False, backend: Backend = "portable") -> Packed:
    """Return an fp4 matrix in fp8: a block's scale is the largest of its groups' over 2^6, and at least 2^-127.

    A value that E4M3 then lacks is a ``ValueError`` that names its block, unless ``lossy``, which rounds it. All values
    of a group are there as long as its scale is at least 2^-14 of the block's largest.
    """
    if packed.kind != "fp4":
        raise ValueError(f"packed is {packed.kind}; expected fp4")
    packed.check_scales()
    codes, scales, lost = pick(backend, reference=reference.reblock, portable=portable.reblock)(packed)
    if not lossy and bool(lost.any()):
        block = lost.nonzero()[0].tolist()
        held = f"{int(lost[tuple(block)])} values that FP8 lacks in block {block}, {int((lost > 0).sum())} such blocks"
        raise ValueError(f"packed has {held} of {lost.numel()}; expected scales less far apart, or lossy=True")
    return Packed(codes, scales, "fp8")


def round_rows(
    x: torch.Tensor, group: int = ACTIVATION_GROUP, channels: int | None = None, *, backend: Backend = "portable"
) -> torch.Tensor:
    """Return x [..., K] float with its first ``channels`` (or all) through E4M3 and back, in shape and dtype of x.

    Released: groups of 128 before every FP8 or FP4 product, groups of 64 on the channels of cache rows that do not
    rotate. Straight-through gradient.
    """
    _check_rows(x, group)
    rounded = x.shape[-1] if channels is None else channels
    if not 1 <= rounded <= x.shape[-1]:
        raise ValueError(f"channels is {channels}; expected 1 to {x.shape[-1]}, those of x")
    run = pick(
        backend,
        reference=reference.round_rows,
        portable=portable.round_rows,
        native=native.round_rows,
        triton="lowbit.triton:round_rows",
    )
    return _through(x, partial(run, group=group, channels=rounded), _unchanged)


def round_index(x: torch.Tensor, *, backend: Backend = "portable") -> torch.Tensor:
    """Return the Hadamard transform of x [..., J] float through E2M1 and back, in shape and dtype of x.

    J is a power of two. The transform is rounded to the dtype of x first. The gradient passes straight through the
    rounding, and through the transform as it should.
    """
    _check_rows(x, FP4_GROUP)
    width = x.shape[-1]
    if width & (width - 1):
        raise ValueError(f"x has {width} channels; expected a power of two")
    run = pick(
        backend,
        reference=reference.round_index,
        portable=portable.round_index,
        native=native.round_index,
        triton="lowbit.triton:round_index",
    )
    return _through(x, run, partial(hadamard, backend=backend))


def round_entries(
    x: torch.Tensor, rotary_dims: int, *, is_index: bool = False, backend: Backend = "portable"
) -> torch.Tensor:
    """Return what a released cache holds of x [..., K]: ``round_rows`` of the channels that do not rotate, by 64.

    is_index: of indexer queries and keys, ``round_index``.
    """
    if is_index:
        return round_index(x, backend=backend)
    channels = x.shape[-1] - rotary_dims
    return round_rows(x, CACHE_GROUP, channels, backend=backend) if channels else x


def round_fp4(w: torch.Tensor, *, dtype: torch.dtype = torch.float32, backend: Backend = "portable") -> torch.Tensor:
    """Return what ``dequantise`` makes of ``quantise_fp4(w)``, [..., O, I] in ``dtype``; straight-through gradient.

    Made for training: w is not checked, and a NaN makes its group NaN.
    """
    _check_weight(w, FP4_GROUP)
    run = pick(
        backend,
        reference=reference.round_fp4,
        portable=portable.round_fp4,
        native=native.round_fp4,
        triton="lowbit.triton:round_fp4",
    )
    return _through(w, partial(run, dtype=dtype), _unchanged)


def round_blocks(w: torch.Tensor, *, dtype: torch.dtype = torch.float32, backend: Backend = "portable") -> torch.Tensor:
    """Return what ``dequantise`` makes of ``quantise_blocks(w)``, [..., O, I] in ``dtype``; straight-through gradient.

    Made for training: w is not checked, and a NaN stays one.
    """
    _check_weight(w)
    run = pick(
        backend,
        reference=reference.round_blocks,
        portable=portable.round_blocks,
        native=native.round_blocks,
        triton="lowbit.triton:round_blocks",
    )
    return _through(w, partial(run, dtype=dtype), _unchanged)


def _through(
    x: torch.Tensor, run: Callable[[torch.Tensor], torch.Tensor], back: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Return run(x), whose gradient goes through ``back`` instead."""
    return _Through.apply(x, run, back) if wants_gradient(x) else run(x)


def _unchanged(grad: torch.Tensor) -> torch.Tensor:
    return grad


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, run, back):
        ctx.back = back
        return run(x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.back(grad), None, None  # autograd casts it to the dtype of x


def _check_rows(x: torch.Tensor, group: int) -> None:
    check_floating("x", x)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x has shape {list(x.shape)}; expected [..., channels], at least one")
    if group < 1:
        raise ValueError(f"group is {group}; expected at least 1")


def _check_weight(w: torch.Tensor, multiple: int = 1) -> None:
    check_floating("w", w)
    if w.dim() < 2 or 0 in w.shape[-2:] or w.shape[-1] % multiple:
        wanted = "[..., O, I], at least one row and column" + (f", I a multiple of {multiple}" if multiple > 1 else "")
        raise ValueError(f"w has shape {list(w.shape)}; expected {wanted}")


def _check_finite(w: torch.Tensor) -> None:
    if w.numel() and not all(bool(end.isfinite()) for end in w.aminmax()):  # no tensor besides w: it may be large
        is_bad = ~w.isfinite()
        first = is_bad.nonzero()[0].tolist()
        held = f"{w[tuple(first)].item()} at {first}, and {int(is_bad.sum())} such of {w.numel()}"
        raise ValueError(f"w holds {held}; expected finite numbers in a weight to be quantised")
