"""The specification of the indexer: every score, a stable sort."""

from __future__ import annotations

import torch


def all_scores(q: torch.Tensor, k: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Score every entry for every query: [B, T, C]. The products are rounded to the dtype of q."""
    wide = torch.promote_types(q.dtype, torch.float32)
    dots = torch.einsum("btij,bcj->btic", q.to(wide), k.to(wide)).to(q.dtype)
    return torch.einsum("bti,btic->btc", weights.to(wide), dots.to(wide).relu())


def select(
    q: torch.Tensor,
    k: torch.Tensor,
    weights: torch.Tensor,
    entry_begin: torch.Tensor,
    entry_end: torch.Tensor,
    num_picks: int,
) -> torch.Tensor:
    """See ``dsv4.ops.index.select``."""
    num_entries = k.shape[1]
    entry = torch.arange(num_entries, device=q.device)
    is_visible = (entry >= entry_begin[..., None]) & (entry < entry_end[..., None])  # [B, T, C]
    scores = all_scores(q, k, weights).masked_fill(~is_visible, -torch.inf)
    best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :num_picks]
    best = best.masked_fill(~is_visible.gather(-1, best), num_entries)  # invisible picks sort to the end
    best = best.sort(dim=-1).values
    return best.masked_fill(best == num_entries, -1)


def score(q: torch.Tensor, k: torch.Tensor, weights: torch.Tensor, picked: torch.Tensor) -> torch.Tensor:
    """See ``dsv4.ops.index.score``."""
    scores = all_scores(q, k, weights)
    return scores.gather(-1, picked.clamp(min=0)).masked_fill(picked < 0, -torch.inf)
