"""The specification of the linear maps: products and sums in at least float32, one rounding."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dsv4.ops.lowbit import ACTIVATION_GROUP, BLOCK, FP4_GROUP, Packed, dequantise, quantise_rows


def linear(x: torch.Tensor, weight: torch.Tensor | Packed, wide: bool) -> torch.Tensor:
    """See ``dsv4.ops.linear.linear``."""
    if isinstance(weight, Packed):
        return _of_codes(x, weight, wide)
    compute = torch.promote_types(x.dtype, torch.float32)
    used = weight if wide else weight.to(x.dtype)
    y = (x.to(compute).unsqueeze(-2) * used.to(compute)).sum(-1)
    return y if wide else y.to(x.dtype)


def _of_codes(x: torch.Tensor, weight: Packed, wide: bool) -> torch.Tensor:
    """Sums of E4M3 codes by codes over a group, times the scales of both, added group after group."""
    codes, scales = quantise_rows(x, backend="reference")  # [..., K], [..., groups]
    a = codes.view(torch.float8_e4m3fn).float()
    shared = scales.view(torch.float8_e8m0fnu).float()
    group = FP4_GROUP if weight.kind == "fp4" else BLOCK
    is_float = weight.scales.dtype == torch.float32
    own = weight.scales if is_float else weight.scales.view(torch.float8_e8m0fnu).float()
    own = own if weight.kind == "fp4" else own.repeat_interleave(BLOCK, dim=0)[: weight.shape[0]]  # [N, groups]
    ones = torch.full_like(weight.scales, 1 if is_float else 127)
    b = dequantise(Packed(weight.codes, ones, weight.kind), torch.float32, backend="reference")  # [N, K], the codes
    total = x.new_zeros(*x.shape[:-1], weight.shape[0], dtype=torch.float32)
    for g, first in enumerate(range(0, x.shape[-1], group)):
        now = slice(first, first + group)
        partial = (a[..., None, now] * b[:, now]).sum(-1)  # [..., N]
        total = total + partial * (shared[..., first // ACTIVATION_GROUP, None] * own[:, g])
    return total if wide else total.to(x.dtype)


def linears(x: torch.Tensor, weights: Sequence[torch.Tensor | Packed], wide: Sequence[bool]) -> list[torch.Tensor]:
    """See ``dsv4.ops.linear.linears``."""
    return [linear(x, weight, is_wide) for weight, is_wide in zip(weights, wide, strict=True)]


def linear_groups(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """See ``dsv4.ops.linear.linear_groups``."""
    return torch.cat([linear(x[:, group], weight[group], False) for group in range(x.shape[1])], dim=-1)
