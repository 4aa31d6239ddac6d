"""Linear maps in a fixed order by a C kernel (``native/linear.c``); the portable ones where a gradient is asked for."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from dsv4 import native
from dsv4.ops.linear import portable


def linear(x: torch.Tensor, weight: torch.Tensor, wide: bool) -> torch.Tensor:
    """See ``dsv4.ops.linear.linear``."""
    return linears(x, [weight], [wide])[0]


def linears(x: torch.Tensor, weights: Sequence[torch.Tensor], wide: Sequence[bool]) -> list[torch.Tensor]:
    """See ``dsv4.ops.linear.linears``."""
    if not _serves(x, weights):
        return portable.linears(x, weights, wide)
    rows = _whole_rows(x if x.dim() == 2 else x.reshape(-1, x.shape[-1]))
    used = [_whole_rows(weight) for weight in weights]  # copies must outlive the call
    start, leading, outs, maps = rows.data_ptr(), x.shape[:-1], [], []
    for weight, is_wide in zip(used, wide, strict=True):
        N, stride = weight.shape[0], weight.stride()[0]
        outs.append(out := torch.empty(*leading, N, dtype=torch.float32 if is_wide else x.dtype))
        maps += _map(start, weight.data_ptr(), stride, weight.dtype, is_wide, N, out.data_ptr(), N)
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
        maps += _map(begin, read, weight.stride(1), weight.dtype, False, N, made, G * N)
    _run(x[:, 0], maps)
    return out


def _serves(x: torch.Tensor, weights: Sequence[torch.Tensor]) -> bool:
    tensors = [x, *weights]
    return not native.wants_gradient(*tensors) and all(native.serves(one) and one.numel() for one in tensors)


def _whole_rows(x: torch.Tensor) -> torch.Tensor:
    """x, copied unless the elements of its rows lie side by side."""
    return x if x.is_contiguous() or x.stride(-1) == 1 else x.contiguous()


def _map(
    x: int, weight: int, weight_stride: int, dtype: torch.dtype, wide: bool, N: int, out: int, out_stride: int
) -> tuple[int, ...]:
    """The fields of ``Map`` in ``native/linear.c``; x, weight and out are addresses, dtype the weight's."""
    return x, weight, weight_stride, dtype == torch.bfloat16, wide, N, out, out_stride


def _run(rows: torch.Tensor, maps: Sequence[int]) -> None:
    """Run the maps of rows [M, K]."""
    table = (ctypes.c_long * len(maps))(*maps)
    native.call(
        "dsv4_linears", *rows.shape, rows.stride(0), native.is_bfloat16(rows), len(maps) // 8,
        torch.get_num_threads(), table,
    )  # fmt: skip
