"""Where every token of a call stands: positions, windows, visible entries. Computed once, read by every layer.

A row of tokens is one sequence, possibly continuing a state, or several documents packed end to end. Each
question a layer asks has an interval for an answer, per query: which raw tokens, which compressed entries.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from dsv4.device import is_accelerator


@dataclass(frozen=True)
class Blocks:
    """Compressed entries of one ratio m, as the call's tokens see and complete them.

    begin, end: [B, T] int64, the entries visible to each query: an entry becomes visible with the last
    token of its block (0-based position t sees entries i < (t + 1) // m of its document).
    entry_positions: [B, C] int64, the position of the first token of each block completed by this call.
    tokens: [B, C, m] int64, the tokens of each block within the call, and is_first: [B, C], whether it is
    the first of its document; both None unless documents are packed. Rows with fewer blocks than C repeat
    token 0 in entries that no query sees.
    """

    begin: torch.Tensor
    end: torch.Tensor
    entry_positions: torch.Tensor
    tokens: torch.Tensor | None = None
    is_first: torch.Tensor | None = None


@dataclass(frozen=True)
class Rows:
    """The places of a call's tokens.

    positions: [B, T] int64 inside the document; raw_begin: [B, T] int64, the first raw token of the
    document, counted in the layer's source (history, then the call's tokens); blocks: by ratio.
    """

    positions: torch.Tensor
    raw_begin: torch.Tensor
    blocks: dict[int, Blocks]


def continued(batch_size: int, num_tokens: int, length: int, ratios: Iterable[int], device: torch.device) -> Rows:
    """Place ``num_tokens`` more tokens in rows that already hold ``length``."""
    positions = torch.arange(length, length + num_tokens, device=device).expand(batch_size, -1)
    zero = torch.zeros_like(positions)
    blocks = {}
    for ratio in ratios:
        done, total = length // ratio, (length + num_tokens) // ratio
        entry_positions = torch.arange(done, total, device=device).expand(batch_size, -1) * ratio
        blocks[ratio] = Blocks(begin=zero, end=(positions + 1) // ratio, entry_positions=entry_positions)
    return Rows(positions=positions, raw_begin=zero, blocks=blocks)


def packed(segment_ids: torch.Tensor, ratios: Iterable[int]) -> Rows:
    """Place tokens of packed documents; a document is a run of equal ids in [B, T] int64."""
    B, T = segment_ids.shape
    token = torch.arange(T, device=segment_ids.device).expand(B, T)
    is_start = torch.ones_like(segment_ids, dtype=torch.bool)
    is_start[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    start = (token * is_start).cummax(dim=1).values  # [B, T]: the document's first token
    positions = token - start
    return Rows(positions=positions, raw_begin=start, blocks={m: _packed_blocks(positions, start, m) for m in ratios})


def _packed_blocks(positions: torch.Tensor, start: torch.Tensor, ratio: int) -> Blocks:
    closes = (positions + 1) % ratio == 0  # [B, T]: the token is the last of a block
    end = closes.cumsum(dim=1)
    begin = torch.where(start > 0, end.gather(1, (start - 1).clamp(min=0)), 0)
    # As many as the fullest row has; to look for it would make an accelerator wait, and there is never more than this.
    num_entries = positions.shape[1] // ratio if is_accelerator(positions.device) else int(end[:, -1].max())
    # The c-th closing token of a row, first rows' padding included: a stable sort brings them to the front.
    close = (~closes).to(torch.uint8).argsort(dim=1, stable=True)[:, :num_entries]  # [B, C]
    is_entry = closes.gather(1, close)
    offset = torch.arange(1 - ratio, 1, device=positions.device)
    tokens = torch.where(is_entry[..., None], close[..., None] + offset, 0)  # [B, C, m]
    entry_positions = positions.gather(1, tokens[..., 0])
    return Blocks(begin=begin, end=end, entry_positions=entry_positions, tokens=tokens, is_first=entry_positions == 0)
