"""Index scores and choices for a few queries at a time: no [T, C] tensor of the whole sequence exists."""

from __future__ import annotations

import torch

SCORES_HELD = 1 << 21  # scores of one group of queries, elements
DOTS_HELD = 1 << 20  # per-head products of one group with one slice of entries, elements
ENTRIES_AT_ONCE = 512  # entries of such a slice, more when the group is small


def select(
    q: torch.Tensor,
    k: torch.Tensor,
    weights: torch.Tensor,
    entry_begin: torch.Tensor,
    entry_end: torch.Tensor,
    num_picks: int,
) -> torch.Tensor:
    """See ``dsv4.ops.index.select``."""
    B, T = q.shape[:2]
    num_entries = k.shape[1]
    picked = entry_end.new_full((B, T, num_picks), -1)
    if picked.numel() == 0:
        return picked
    keys = k.float().transpose(1, 2)  # [B, J, C]
    group = max(1, min(SCORES_HELD // (B * num_entries), DOTS_HELD // (B * q.shape[2] * ENTRIES_AT_ONCE)))
    for t in range(0, T, group):
        now = slice(t, t + group)
        last = min(int(entry_end[:, now].max()), num_entries)
        if last == 0:
            continue
        scores = _scores(q[:, now].float(), keys[..., :last], weights[:, now].float())
        entry = torch.arange(last, device=q.device)
        hidden = (entry < entry_begin[:, now, None]) | (entry >= entry_end[:, now, None])  # [B, g, C]
        scores = torch.where(hidden, -torch.inf, scores)
        width = min(num_picks, last)
        picked[:, now, :width] = _best(scores, width)
    return picked


def _scores(q: torch.Tensor, keys: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """q: [B, g, I, J]; keys: [B, J, C]; weights: [B, g, I]; returns [B, g, C]."""
    B, g, num_heads, _ = q.shape
    num_entries = keys.shape[-1]
    scores = q.new_empty(B, g, num_entries)
    step = max(ENTRIES_AT_ONCE, DOTS_HELD // (B * g * num_heads))
    rows = q.flatten(1, 2)  # [B, g * I, J]
    for c in range(0, num_entries, step):
        dots = torch.bmm(rows, keys[..., c : c + step]).relu_()  # [B, g * I, c]
        dots = dots.view(B * g, num_heads, -1)
        scores[..., c : c + step] = torch.bmm(weights.reshape(B * g, 1, num_heads), dots).view(B, g, -1)
    return scores


def _best(scores: torch.Tensor, num_picks: int) -> torch.Tensor:
    """The num_picks best of each row, ascending, -1 last; equal scores go to the smaller entry."""
    num_entries = scores.shape[-1]
    best = scores.topk(num_picks, dim=-1, sorted=False)
    threshold = best.values.amin(dim=-1, keepdim=True)
    is_ambiguous = ((scores >= threshold).sum(dim=-1) > num_picks) & (threshold[..., 0] > -torch.inf)
    entries = best.indices
    if bool(is_ambiguous.any()):
        tied = scores[is_ambiguous]  # [n, C]
        entries[is_ambiguous] = tied.sort(dim=-1, descending=True, stable=True).indices[:, :num_picks]
    is_hidden = scores.gather(-1, entries) == -torch.inf
    entries = entries.masked_fill(is_hidden, num_entries).sort(dim=-1).values
    return entries.masked_fill(entries == num_entries, -1)


def score(q: torch.Tensor, k: torch.Tensor, weights: torch.Tensor, picked: torch.Tensor) -> torch.Tensor:
    """See ``dsv4.ops.index.score``: work and memory proportional to the picks."""
    B, T, num_picks = picked.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    row = torch.arange(B, device=q.device)[:, None, None] * k.shape[1]
    keys = k.to(wide).flatten(0, 1).index_select(0, (picked.clamp(min=0) + row).flatten())
    keys = keys.view(B * T, num_picks, k.shape[-1])  # [B * T, P, J]
    dots = torch.bmm(q.to(wide).flatten(0, 1), keys.transpose(1, 2)).relu()  # [B * T, I, P]
    scores = torch.bmm(weights.to(wide).flatten(0, 1).unsqueeze(1), dots).view(B, T, num_picks)
    return scores.masked_fill(picked < 0, -torch.inf)
