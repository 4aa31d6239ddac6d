"""The specification of compression: one entry at a time."""

from __future__ import annotations

import torch


def pool_plain(kv: torch.Tensor, score: torch.Tensor) -> torch.Tensor:
    """kv, score: [B, C, m, K]; returns [B, C, K]."""
    return (score.softmax(dim=2) * kv).sum(dim=2)


def pool_overlapped(kv: torch.Tensor, score: torch.Tensor, is_first: torch.Tensor) -> torch.Tensor:
    """kv, score: [B, C, m, 2K]; is_first: [B, C]; returns [B, C, K]."""
    B, C, _, width = kv.shape
    half = width // 2
    entries = kv.new_zeros(B, C, half)
    for b in range(B):
        for i in range(C):
            slots, weights = kv[b, i, :, half:], score[b, i, :, half:]  # [m, K]: what the block gives itself
            if not is_first[b, i]:
                slots = torch.cat([kv[b, i - 1, :, :half], slots])  # [2m, K]
                weights = torch.cat([score[b, i - 1, :, :half], weights])
            entries[b, i] = (weights.softmax(dim=0) * slots).sum(dim=0)
    return entries
