"""The specification of the linear maps: products and sums in at least float32, one rounding."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def linear(x: torch.Tensor, weight: torch.Tensor, wide: bool) -> torch.Tensor:
    """See ``dsv4.ops.linear.linear``."""
    compute = torch.promote_types(x.dtype, torch.float32)
    used = weight if wide else weight.to(x.dtype)
    y = (x.to(compute).unsqueeze(-2) * used.to(compute)).sum(-1)
    return y if wide else y.to(x.dtype)


def linears(x: torch.Tensor, weights: Sequence[torch.Tensor], wide: Sequence[bool]) -> list[torch.Tensor]:
    """See ``dsv4.ops.linear.linears``."""
    return [linear(x, weight, is_wide) for weight, is_wide in zip(weights, wide, strict=True)]


def linear_groups(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """See ``dsv4.ops.linear.linear_groups``."""
    return torch.cat([linear(x[:, group], weight[group], False) for group in range(x.shape[1])], dim=-1)
