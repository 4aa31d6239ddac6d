"""The balance loss as one dot product: counts of a document, spread over its tokens, with their shares."""

from __future__ import annotations

import torch


def balance(
    affinities: torch.Tensor, chosen: torch.Tensor, documents: torch.Tensor, token_weights: torch.Tensor
) -> torch.Tensor:
    """See ``dsv4.ops.balance``."""
    E, A = affinities.shape[1], chosen.shape[1]
    sizes = documents.bincount()  # [documents]
    weights = torch.zeros_like(sizes, dtype=affinities.dtype).index_add_(0, documents, token_weights.to(affinities))
    counts = (documents[:, None] * E + chosen).flatten().bincount(minlength=len(sizes) * E).view(-1, E)
    # Of a document: weight * E / (A n) * counts . (1 / n) * sum of its tokens' shares.
    factors = counts * (weights * E / (A * sizes**2))[:, None]
    shares = affinities / affinities.sum(dim=-1, keepdim=True)  # [T, E]
    return (shares * factors[documents]).sum()
