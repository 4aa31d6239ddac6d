"""Index scores and choices for a few queries at a time: no [T, C] tensor of the whole sequence exists."""

from __future__ import annotations

import torch

SCORES_HELD = 1 << 21  # scores of one group of queries, elements
DOTS_HELD = 1 << 20  # per-head products of one group with one slice of entries, elements
ENTRIES_AT_ONCE = 512  # entries of such a slice, more when the group is small
FOLD = 16  # scores that are first represented by their largest


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
    keys = k.transpose(1, 2)  # [B, J, C]
    group = max(1, min(SCORES_HELD // (B * num_entries), DOTS_HELD // (B * q.shape[2] * ENTRIES_AT_ONCE)))
    for t in range(0, T, group):
        now = slice(t, t + group)
        begin, end = entry_begin[:, now, None], entry_end[:, now, None].clamp(max=num_entries)  # [B, g, 1]
        if int((end - begin).max()) <= num_picks:
            every = begin + torch.arange(num_picks, device=q.device)
            picked[:, now] = every.masked_fill(every >= end, -1)
        else:
            scores = _scores(q[:, now], keys[..., : int(end.max())], weights[:, now])
            # Only the entries some query must not see are masked; without packing these are the last few.
            first = 0 if bool(begin.any()) else int(end.min())
            entry = torch.arange(first, scores.shape[-1], device=q.device)
            scores[..., first:].masked_fill_((entry < begin) | (entry >= end), -torch.inf)
            picked[:, now] = _best(scores, num_picks)
    return picked


def _scores(q: torch.Tensor, keys: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """q: [B, g, I, J]; keys: [B, J, C]; weights: [B, g, I]; returns [B, g, C] wide, filled up to whole folds."""
    B, g, num_heads, _ = q.shape
    num_entries = keys.shape[-1]
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = q.new_full((B, g, -(-num_entries // FOLD) * FOLD), -torch.inf, dtype=wide)
    step = max(ENTRIES_AT_ONCE, DOTS_HELD // (B * g * num_heads))
    rows = q.flatten(1, 2)  # [B, g * I, J]
    weights = weights.to(wide).reshape(B * g, 1, num_heads)
    for c in range(0, num_entries, step):
        now = slice(c, min(c + step, num_entries))
        dots = torch.bmm(rows, keys[..., now]).to(wide).relu_()  # [B, g * I, c]
        dots = dots.view(B * g, num_heads, -1)
        scores[..., now] = torch.bmm(weights, dots).view(B, g, -1)
    return scores


def _best(scores: torch.Tensor, num_picks: int) -> torch.Tensor:
    """The num_picks best of each row, ascending, -1 last; equal scores go to the smaller entry."""
    num_entries = scores.shape[-1]
    values, entries = _largest(scores, num_picks)
    threshold = values.amin(dim=-1, keepdim=True)
    is_ambiguous = ((scores >= threshold).sum(dim=-1) > num_picks) & (threshold[..., 0] > -torch.inf)
    if bool(is_ambiguous.any()):
        tied = scores[is_ambiguous]  # [n, C]
        entries[is_ambiguous] = tied.sort(dim=-1, descending=True, stable=True).indices[:, :num_picks]
    is_hidden = scores.gather(-1, entries) == -torch.inf
    entries = entries.masked_fill(is_hidden, num_entries).sort(dim=-1).values
    return entries.masked_fill(entries == num_entries, -1)


def _largest(scores: torch.Tensor, num_picks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and places of the num_picks largest of each row, any of equal ones: [B, g, P].

    Columns of ``FOLD`` scores, a row apart from one another, are first judged by their largest: the best
    scores lie in the best columns, and far fewer numbers need ordering.
    """
    num_columns = scores.shape[-1] // FOLD
    if num_columns < 2 * num_picks:
        values, places = scores.topk(num_picks, dim=-1, sorted=False)
        return values, places
    folded = scores.unflatten(-1, (FOLD, num_columns))  # [B, g, FOLD, columns]
    columns = folded.amax(dim=-2).topk(num_picks, dim=-1, sorted=False).indices  # [B, g, P]
    kept = folded.gather(-1, columns[..., None, :].expand(-1, -1, FOLD, -1))  # [B, g, FOLD, P]
    values, places = kept.flatten(-2).topk(num_picks, dim=-1, sorted=False)
    return values, places // num_picks * num_columns + columns.gather(-1, places % num_picks)


def score(q: torch.Tensor, k: torch.Tensor, weights: torch.Tensor, picked: torch.Tensor) -> torch.Tensor:
    """See ``dsv4.ops.index.score``: work and memory proportional to the picks."""
    B, T, num_picks = picked.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    row = torch.arange(B, device=q.device)[:, None, None] * k.shape[1]
    keys = k.to(wide).flatten(0, 1).index_select(0, (picked.clamp(min=0) + row).flatten())
    keys = keys.view(B * T, num_picks, k.shape[-1])  # [B * T, P, J]
    dots = torch.bmm(q.to(wide).flatten(0, 1), keys.transpose(1, 2))  # [B * T, I, P]
    dots = dots.to(q.dtype).to(wide).relu()
    scores = torch.bmm(weights.to(wide).flatten(0, 1).unsqueeze(1), dots).view(B, T, num_picks)
    return scores.masked_fill(picked < 0, -torch.inf)
