"""The balance loss as one dot product: counts of a document, spread over its tokens, with their shares."""

from __future__ import annotations

import torch

from dsv4.device import is_accelerator


def balance(
    affinities: torch.Tensor, chosen: torch.Tensor, documents: torch.Tensor, token_weights: torch.Tensor
) -> torch.Tensor:
    """See ``dsv4.ops.balance``."""
    E, A = affinities.shape[1], chosen.shape[1]
    # Numbers of documents are read where that makes nobody wait: there are never more than tokens.
    num_documents = len(documents) if is_accelerator(documents.device) else int(documents[-1]) + 1
    sizes = _count(documents, num_documents)
    weights = torch.zeros_like(sizes, dtype=affinities.dtype).index_add_(0, documents, token_weights.to(affinities))
    counts = _count((documents[:, None] * E + chosen).flatten(), num_documents * E).view(-1, E)
    # Of a document: weight * E / (A n) * counts . (1 / n) * sum of its tokens' shares.
    factors = counts * (weights * E / (A * sizes**2))[:, None]
    shares = affinities / affinities.sum(dim=-1, keepdim=True)  # [T, E]
    return (shares * factors[documents]).sum()


def _count(numbers: torch.Tensor, most: int) -> torch.Tensor:
    """How often each number below ``most`` is there, int64."""
    return numbers.new_zeros(most).scatter_add_(0, numbers, torch.ones_like(numbers))
