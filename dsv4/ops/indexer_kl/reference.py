"""The specification of the indexer's loss: all queries, heads and entries at once, in logarithms."""

from __future__ import annotations

import torch

from dsv4.ops.attend import Entries
from dsv4.ops.attend.reference import seen_entries
from dsv4.ops.index.reference import all_scores


def indexer_kl(
    index_q: torch.Tensor,
    index_k: torch.Tensor,
    index_weights: torch.Tensor,
    q: torch.Tensor,
    entries: Entries,
    log_sum_exp: torch.Tensor,
    query_weights: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See ``dsv4.ops.indexer_kl``."""
    is_seen = seen_entries(entries)  # [B, T, C]
    mass = log_mass(q, entries.values, log_sum_exp, scale)
    teacher = mass.masked_fill(~is_seen, -torch.inf).log_softmax(dim=-1)
    scores = all_scores(index_q, index_k, index_weights)
    student = scores.masked_fill(~is_seen, -torch.inf).log_softmax(dim=-1)
    uniform = torch.zeros_like(scores).masked_fill(~is_seen, -torch.inf).log_softmax(dim=-1)

    def divergence(log_student: torch.Tensor) -> torch.Tensor:
        terms = teacher.exp() * (teacher - log_student)
        return torch.where(is_seen, terms, 0).sum(dim=-1)

    kl = divergence(student)  # [B, T]
    return (query_weights * kl).sum(), kl.detach(), divergence(uniform)


def recall(
    q: torch.Tensor, entries: Entries, log_sum_exp: torch.Tensor, picked: torch.Tensor, scale: float
) -> torch.Tensor:
    """See ``dsv4.ops.indexer_kl.recall``."""
    num_picks = picked.shape[-1]
    is_seen = seen_entries(entries)  # [B, T, C]
    mass = log_mass(q, entries.values, log_sum_exp, scale).masked_fill(~is_seen, -torch.inf)
    best = mass.sort(dim=-1, descending=True, stable=True).indices[..., :num_picks]
    is_picked = seen_entries(Entries(entries.values, picked=picked))
    shares = is_picked.gather(-1, best).to(mass.dtype).mean(dim=-1)  # [B, T]
    return shares.where(is_seen.sum(dim=-1) > num_picks, torch.nan)


def log_mass(q: torch.Tensor, values: torch.Tensor, log_sum_exp: torch.Tensor, scale: float) -> torch.Tensor:
    """The logarithm of what all heads together give to each entry: [B, T, C]."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("bthk,bck->bthc", q.to(wide), values.to(wide)) * scale
    return (scores - log_sum_exp[..., None]).logsumexp(dim=2)
