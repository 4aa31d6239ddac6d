"""The specification of the rotation."""

from __future__ import annotations

import torch

from dsv4.ops.rmsnorm.reference import rmsnorm


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool = False) -> torch.Tensor:
    """See ``dsv4.ops.rope.rotate``; cos and sin broadcast against the pairs of x."""
    sin = -sin if inverse else sin
    rotary_dims = 2 * cos.shape[-1]
    kept, turned = x[..., :-rotary_dims], x[..., -rotary_dims:].to(torch.promote_types(x.dtype, cos.dtype))
    a, b = turned[..., 0::2], turned[..., 1::2]
    pairs = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1)  # [..., R / 2, 2]
    return torch.cat([kept, pairs.flatten(-2).to(x.dtype)], dim=-1)


def rotate_unit(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float) -> torch.Tensor:
    """See ``dsv4.ops.rope.rotate_unit``."""
    return rotate(rmsnorm(x, None, eps), cos, sin)
