"""The specification of attention: one row of scores over all raw tokens and all entries."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from dsv4.ops.attend import Entries


def attend(
    q: torch.Tensor,
    kv: torch.Tensor,
    sink: torch.Tensor,
    raw_begin: torch.Tensor,
    entries: Entries | None,
    window: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``dsv4.ops.attend``."""
    T, S = q.shape[1], kv.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    own = torch.arange(S - T, S, device=q.device)[:, None]  # [T, 1]: the query's own place in kv
    raw = torch.arange(S, device=q.device)
    is_seen = (raw <= own) & (raw > own - window) & (raw >= raw_begin[..., None])  # [B, T, S]
    keys = kv
    if entries is not None:
        keys = torch.cat([kv, entries.values], dim=1)  # [B, S + C, K]
        is_seen = torch.cat([is_seen, seen_entries(entries)], dim=-1)  # [B, T, S + C]
    keys = keys.to(wide)
    scores = torch.einsum("bthk,bsk->bths", q.to(wide), keys) * scale
    scores = scores.masked_fill(~is_seen[:, :, None], -torch.inf)
    with_sink = torch.cat([scores, sink.to(wide).expand(*scores.shape[:3])[..., None]], dim=-1)
    log_total = with_sink.logsumexp(dim=-1)  # [B, T, H]
    out = torch.einsum("bths,bsk->bthk", (scores - log_total[..., None]).exp(), keys)
    return out.to(q.dtype), log_total.detach()


def seen_entries(entries: Entries) -> torch.Tensor:
    """Which entries each query sees: [B, T, C] bool."""
    num_entries = entries.values.shape[1]
    if entries.picked is not None:
        counts = entries.picked.new_zeros(*entries.picked.shape[:2], num_entries + 1)
        return counts.scatter(-1, entries.picked % (num_entries + 1), 1)[..., :num_entries].bool()
    assert entries.begin is not None
    assert entries.end is not None
    entry = torch.arange(num_entries, device=entries.values.device)
    return (entry >= entries.begin[..., None]) & (entry < entries.end[..., None])
