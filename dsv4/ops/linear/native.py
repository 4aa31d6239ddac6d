"""Linear maps in a fixed order by a C kernel (``native/linear.c``); the portable ones where a gradient is asked for."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from dsv4 import native
from dsv4.ops.linear import portable
from dsv4.ops.linear.portable import Weight
from dsv4.ops.lowbit import Packed, round_rows
from dsv4.ops.lowbit.native import kind_of

FIELDS = 10  # of ``Map`` in ``native/linear.c``


def linear(x: torch.Tensor, weight: Weight, wide: bool) -> torch.Tensor:
    """See ``dsv4.ops.linear.linear``."""
    return linears(x, [weight], [wide])[0]


def linears(x: torch.Tensor, weights: Sequence[Weight], wide: Sequence[bool]) -> list[torch.Tensor]:
    """See ``dsv4.ops.linear.linears``."""
    if not _serves(x, weights):
        return portable.linears(x, weights, wide)
    rows = _whole_rows(x if x.dim() == 2 else x.reshape(-1, x.shape[-1]))
    rounded: torch.Tensor | None = None  # for weights in codes
    if any(isinstance(weight, Packed) for weight in weights):
        rows = rows.contiguous()
        rounded = round_rows(rows, backend="native")
    used: list[torch.Tensor] = []  # copies must outlive the call
    leading, outs, maps = x.shape[:-1], [], []
    for weight, is_wide in zip(weights, wide, strict=True):
        N = weight.shape[0]
        outs.append(out := torch.empty(*leading, N, dtype=torch.float32 if is_wide else x.dtype))
        if isinstance(weight, Packed):
            assert rounded is not None
            codes, scales = weight.codes.contiguous(), weight.scales.contiguous()
            used += [codes, scales]
            own = (codes.data_ptr(), codes.shape[1], kind_of(weight)), (scales.data_ptr(), scales.shape[1])
            start = rounded.data_ptr()
        else:
            used.append(plain := _whole_rows(weight))
            own = (plain.data_ptr(), plain.stride(0), native.is_bfloat16(plain)), (0, 0)
            start = rows.data_ptr()
        maps += start, *own[0], is_wide, N, out.data_ptr(), N, *own[1]
    _run(rows, maps)
    return outs


def linear_groups(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """See ``dsv4.ops.linear.linear_groups``."""
    if not _serves(x, [weight]):
        return portable.linear_groups(x, weight)
    x, weight = _whole_rows(x), _whole_rows(weight)
    (M, G, _), N = x.shape, weight.shape[1]
    out = torch.empty(M, G * N, dtype=x.dtype)
    maps = []
    for group in range(G):
        begin, read, made = (
            tensor.data_ptr() + group * step * tensor.element_size()
            for tensor, step in ((x, x.stride(1)), (weight, weight.stride(0)), (out, N))
        )
        maps += begin, read, weight.stride(1), native.is_bfloat16(weight), False, N, made, G * N, 0, 0
    _run(x[:, 0], maps)
    return out


def _serves(x: torch.Tensor, weights: Sequence[Weight]) -> bool:
    plain = [x, *(weight for weight in weights if not isinstance(weight, Packed))]
    return not native.wants_gradient(*plain) and all(native.serves(one) and one.numel() for one in plain)


def _whole_rows(x: torch.Tensor) -> torch.Tensor:
    """x, copied unless the elements of its rows lie side by side."""
    return x if x.is_contiguous() or x.stride(-1) == 1 else x.contiguous()


def _run(rows: torch.Tensor, maps: Sequence[int]) -> None:
    """Run the maps of rows [M, K]."""
    table = (ctypes.c_long * len(maps))(*maps)
    native.call(
        "dsv4_linears", *rows.shape, rows.stride(0), native.is_bfloat16(rows), len(maps) // FIELDS,
        torch.get_num_threads(), table,
    )  # fmt: skip
