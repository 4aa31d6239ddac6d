"""Slots (token, choice) in the order of their experts, and the tiles of them that kernels take: nothing asks the host.

A program per expert goes through all choices: E T A numbers, which stay in the second-level cache. What a program
needs of the other experts are their counts alone, and those are a kernel before.
"""

# Kernels are a language of their own, in which a constexpr is a number.

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

BLOCK = 1024  # choices, or tiles, of a program at a time


class Sorted(NamedTuple):
    """slots: [T * A] int32, in their own order within an expert; starts: [E + 1] int32, where each expert's begin.

    tile_expert, tile_first: int32, of each tile its expert, and where in ``slots`` it begins. There are as many as
    there may be at most; those that are not have the expert -1.
    """

    slots: torch.Tensor
    starts: torch.Tensor
    tile_expert: torch.Tensor
    tile_first: torch.Tensor


def by_expert(chosen: torch.Tensor, num_experts: int, tokens: int) -> Sorted:
    """Sort the slots of chosen [T, A] int64, in 0 to E - 1, at least one, and cut each expert's into tiles."""
    count = chosen.numel()
    # Whole tiles, and one that is not of each expert there is: of no more than E, and no more than there are slots.
    num_tiles = count // tokens + min(num_experts, count)

    def numbers(size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.int32, device=chosen.device)

    made = Sorted(numbers(count), numbers(num_experts + 1), numbers(num_tiles), numbers(num_tiles))
    counts, chosen = numbers(num_experts), chosen.contiguous()
    _count_kernel[(num_experts,)](chosen, counts, count, BLOCK, num_warps=4)
    _place_kernel[(num_experts,)](
        chosen, counts, *made, count, num_tiles, num_experts, triton.next_power_of_2(num_experts), tokens, BLOCK,
        num_warps=4,
    )  # fmt: skip
    return made


@triton.jit(do_not_specialize=["num_slots"])
def _count_kernel(chosen, counts, num_slots, BLOCK: tl.constexpr):
    expert = tl.program_id(0)
    total = tl.zeros([BLOCK], dtype=tl.int32)
    for first in range(0, num_slots, BLOCK):
        slot = first + tl.arange(0, BLOCK)
        total += (tl.load(chosen + slot, mask=slot < num_slots, other=-1) == expert).to(tl.int32)
    tl.store(counts + expert, tl.sum(total, axis=0))


@triton.jit(do_not_specialize=["num_slots", "num_tiles"])
def _place_kernel(
    chosen, counts, slots, starts, tile_expert, tile_first, num_slots, num_tiles,
    E: tl.constexpr, PADDED: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(0)
    each = tl.arange(0, PADDED)
    before = tl.load(counts + each, mask=(each < E) & (each < expert), other=0)
    start, tile = tl.sum(before, axis=0), tl.sum((before + TOKENS - 1) // TOKENS, axis=0)
    own = tl.load(counts + expert)
    tl.store(starts + expert, start)
    place = start
    for first in range(0, tl.where(own > 0, num_slots, 0), BLOCK):
        slot = first + tl.arange(0, BLOCK)
        is_own = tl.load(chosen + slot, mask=slot < num_slots, other=-1) == expert
        rank = tl.cumsum(is_own.to(tl.int32), axis=0)
        tl.store(slots + place + rank - 1, slot, mask=is_own)
        place += tl.sum(is_own.to(tl.int32), axis=0)
    end = tile + (own + TOKENS - 1) // TOKENS
    for first in range(tile, end, BLOCK):
        each_tile = first + tl.arange(0, BLOCK)
        tl.store(tile_expert + each_tile, expert, mask=each_tile < end)
        tl.store(tile_first + each_tile, start + (each_tile - tile) * TOKENS, mask=each_tile < end)
    if expert == E - 1:
        tl.store(starts + E, start + own)
        for first in range(end, num_tiles, BLOCK):
            no_tile = first + tl.arange(0, BLOCK)
            tl.store(tile_expert + no_tile, -1, mask=no_tile < num_tiles)
