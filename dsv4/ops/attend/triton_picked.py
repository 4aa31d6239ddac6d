"""Gradients that queries found for their picks, added entry by entry: in a fixed order, without atomics.

A picked entry is seen by queries here and there. So queries leave the gradient of the key of each pick behind, and
those of an entry are added along a list of the picks sorted by entry.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def add_picked_(grad: torch.Tensor, parts: torch.Tensor, picked: torch.Tensor) -> None:
    """Add the gradients of each pick, in their order, to that of its entry; overwrites grad.

    grad: [C, K] float32; parts: [t, P, n, K], of any float dtype, n gradients of a pick; picked: [t, P] int64, -1 for
    none. All are contiguous.
    """
    num_entries, K = grad.shape
    by_entry, order = picked.flatten().int().sort(stable=True)  # half the digits to sort by
    starts = torch.searchsorted(by_entry, torch.arange(num_entries + 1, dtype=torch.int32, device=grad.device))
    block = min(128, triton.next_power_of_2(K))
    grid = num_entries, triton.cdiv(K, block)
    _add_picked[grid](parts, order, starts, grad, N=parts.shape[2], K=K, BLOCK_K=block, BLOCK_N=16)


@triton.jit
def _add_picked(
    parts_ptr, order_ptr, starts_ptr, grad_ptr,
    N: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """grad[c] += parts[order[i]] for the picks i of entry c, from starts[c] to starts[c + 1]."""
    entry = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    is_channel = channel < K
    total = tl.load(grad_ptr + entry * K + channel, mask=is_channel, other=0.0)
    end = tl.load(starts_ptr + entry + 1)
    for start in range(tl.load(starts_ptr + entry), end, BLOCK_N):
        pick = start + tl.arange(0, BLOCK_N)
        place = tl.load(order_ptr + pick, mask=pick < end, other=0)
        for i in tl.static_range(N):
            parts_at = parts_ptr + (place * N + i)[:, None] * K + channel[None, :]
            found = tl.load(parts_at, mask=(pick < end)[:, None] & is_channel[None, :], other=0.0)
            total += tl.sum(found.to(tl.float32), axis=0)
    tl.store(grad_ptr + entry * K + channel, total, mask=is_channel)
