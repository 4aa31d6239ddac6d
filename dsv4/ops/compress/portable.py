"""Compression over whole rows. Work and memory are linear in the tokens."""

from __future__ import annotations

import torch

from dsv4.ops.compress.reference import pool_plain as pool_plain  # already one pass over the tokens


def pool_overlapped(kv: torch.Tensor, score: torch.Tensor, is_first: torch.Tensor) -> torch.Tensor:
    """kv, score: [B, C, m, 2K]; is_first: [B, C]; returns [B, C, K]."""
    half = kv.shape[-1] // 2
    if kv.shape[1] == 0:
        return kv.new_zeros(kv.shape[0], 0, half)
    previous_kv = _shift(kv[..., :half])  # [B, C, m, K]
    previous_score = _shift(score[..., :half]).masked_fill(is_first[:, :, None, None], -torch.inf)
    slots = torch.cat([previous_kv, kv[..., half:]], dim=2)  # [B, C, 2m, K]
    weights = torch.cat([previous_score, score[..., half:]], dim=2).softmax(dim=2)
    return (weights * slots).sum(dim=2)


def _shift(blocks: torch.Tensor) -> torch.Tensor:
    """Give every block its predecessor; block 0, which has none, gets zeros."""
    return torch.cat([torch.zeros_like(blocks[:, :1]), blocks[:, :-1]], dim=1)
