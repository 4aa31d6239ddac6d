"""The specification of the balance loss: one document after another."""

from __future__ import annotations

import torch


def balance(
    affinities: torch.Tensor, chosen: torch.Tensor, documents: torch.Tensor, token_weights: torch.Tensor
) -> torch.Tensor:
    """See ``dsv4.ops.balance``."""
    E, A = affinities.shape[1], chosen.shape[1]
    shares = affinities / affinities.sum(dim=-1, keepdim=True)  # [T, E]
    losses = []
    for document in documents.unique():
        inside = documents == document
        f = chosen[inside].flatten().bincount(minlength=E).to(shares.dtype) * (E / (A * int(inside.sum())))
        p = shares[inside].mean(dim=0)
        losses.append(token_weights[inside].sum() * (f * p).sum())
    return torch.stack(losses).sum()
