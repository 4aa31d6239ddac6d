"""The specification of the hyper-connections."""

from __future__ import annotations

import torch

from dsv4.ops.rmsnorm.reference import rmsnorm


def mixes(streams: torch.Tensor, fn: torch.Tensor, norm_eps: float) -> torch.Tensor:
    """Project the normalised streams: [B, T, M]. The normalisation runs over all N * D values."""
    flat = streams.flatten(-2).to(fn.dtype)  # [B, T, N * D], stream 0 first
    inverse_rms = torch.rsqrt(flat.pow(2).mean(-1, keepdim=True) + norm_eps)
    return flat @ fn.T * inverse_rms


def sinkhorn(logits: torch.Tensor, eps: float, iterations: int) -> torch.Tensor:
    """See ``dsv4.ops.mhc.sinkhorn``."""
    comb = logits.softmax(dim=-1) + eps
    comb = comb / (comb.sum(dim=-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        comb = comb / (comb.sum(dim=-1, keepdim=True) + eps)
        comb = comb / (comb.sum(dim=-2, keepdim=True) + eps)
    return comb


def pre(
    streams: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_eps: float,
    eps: float,
    iterations: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See ``dsv4.ops.mhc.pre``."""
    N = streams.shape[2]
    m = mixes(streams, fn, norm_eps)
    pre_weights = torch.sigmoid(scale[0] * m[..., :N] + base[:N]) + eps
    post_weights = 2 * torch.sigmoid(scale[1] * m[..., N : 2 * N] + base[N : 2 * N])
    logits = (scale[2] * m[..., 2 * N :] + base[2 * N :]).unflatten(-1, (N, N))  # [B, T, N, N], row by row
    x = rmsnorm(read(streams, pre_weights), norm_weight, norm_eps)
    return x, post_weights, sinkhorn(logits, eps, iterations), streams


def read(streams: torch.Tensor, pre_weights: torch.Tensor) -> torch.Tensor:
    """Sum the streams with these weights: [B, T, D] in the dtype of streams."""
    return torch.einsum("btn,btnd->btd", pre_weights, streams.to(pre_weights.dtype)).to(streams.dtype)


def post(streams: torch.Tensor, y: torch.Tensor, post_weights: torch.Tensor, comb: torch.Tensor) -> torch.Tensor:
    """See ``dsv4.ops.mhc.post``."""
    mixed = torch.einsum("btjk,btjd->btkd", comb, streams.to(comb.dtype))
    return (post_weights[..., None] * y.to(comb.dtype)[..., None, :] + mixed).to(streams.dtype)


def head(
    streams: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_eps: float,
    eps: float,
) -> torch.Tensor:
    """See ``dsv4.ops.mhc.head``."""
    pre_weights = torch.sigmoid(scale[0] * mixes(streams, fn, norm_eps) + base) + eps
    return rmsnorm(read(streams, pre_weights), norm_weight, norm_eps)
