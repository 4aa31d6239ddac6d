"""Where the tokens of one engine step stand: several sequences in one flat list, caches in slots and pages.

A page is an integer that stands for ``PAGE_TOKENS`` consecutive tokens of one sequence in every layer: 32 entries of a
CSA layer, one of an HCA layer. A slot is the fixed block of a running sequence: window rings and tails, where token p
lies at p modulo their length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

PAGE_TOKENS = 128  # lcm(4, 128), so that every layer's entries fill a page exactly (report 3.6)


class Closing(NamedTuple):
    """The blocks of one ratio that a step completes, in flat order.

    token: [C] int32, the flat index of each block's last token; its entry is ``position[token] // ratio``.
    begin: [C] int32, the position of its first token.
    """

    token: torch.Tensor
    begin: torch.Tensor


class Places(NamedTuple):
    """The places of a step's T tokens. Tokens of one sequence are consecutive and in order.

    slot, position: [T] int32 of each token. first: [T] int32, the flat index of the first token of its sequence in this
    step: tokens from there on are read from the step itself, older ones from ring or tail. table: [num_slots, n] int32,
    the page of tokens 128 i on. closing: by ratio.
    """

    slot: torch.Tensor
    position: torch.Tensor
    first: torch.Tensor
    table: torch.Tensor
    closing: dict[int, Closing]


class Arrangement(NamedTuple):
    """The shape of a step, by which its places lie in one list of numbers.

    num_closing: blocks of each ratio, in ascending order of ratios.
    """

    num_tokens: int
    num_closing: tuple[tuple[int, int], ...]


def arrange(
    sequences: Sequence[tuple[int, int, int, int]], ratios: Sequence[int], *, fills: bool = False
) -> tuple[Arrangement, list[int]]:
    """Place the tokens of a step.

    sequences: slot, position of the first token, number of tokens, and the position from which entries are written, of
    each sequence. Blocks that close before that position are in shared pages already. fills: of a ratio with a closing
    block list as many as there are tokens, the last of them again and again, so that steps have few shapes; to write
    an entry twice changes nothing. Returns the shape, and slot, position and first of all tokens, then token and begin
    of the closing blocks of each ratio, one after the other.
    """
    slot: list[int] = []
    position: list[int] = []
    first: list[int] = []
    closing: dict[int, tuple[list[int], list[int]]] = {ratio: ([], []) for ratio in ratios}
    for own_slot, begin, count, writes_from in sequences:
        start, end = len(slot), begin + count
        slot += [own_slot] * count
        position += range(begin, end)
        first += [start] * count
        for ratio, (token, block) in closing.items():
            last = (max(begin, writes_from) // ratio + 1) * ratio - 1  # of the first block that ends there or later
            token += range(start + last - begin, start + count, ratio)
            block += range(last + 1 - ratio, end + 1 - ratio, ratio)
    if fills:
        for blocks in closing.values():
            for numbers in blocks:
                numbers += numbers[-1:] * (len(slot) - len(numbers))
    shape = Arrangement(len(slot), tuple((ratio, len(token)) for ratio, (token, _) in closing.items()))
    return shape, sum((part for parts in closing.values() for part in parts), slot + position + first)


def places_of(shape: Arrangement, numbers: torch.Tensor, table: torch.Tensor) -> Places:
    """Return the places that ``arrange`` has put into ``numbers``, int32 on the device of the table, as views of it."""
    lengths = [shape.num_tokens] * 3 + [count for _, count in shape.num_closing for _ in range(2)]
    slot, position, first, *blocks = numbers.split(lengths)
    closing = {ratio: Closing(blocks[2 * i], blocks[2 * i + 1]) for i, (ratio, _) in enumerate(shape.num_closing)}
    return Places(slot, position, first, table, closing)
