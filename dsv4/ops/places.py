"""Where the tokens of one engine step stand: several sequences in one flat list, caches in slots and pages.

A page is an integer that stands for ``PAGE_TOKENS`` consecutive tokens of one sequence in every layer: 32 entries of a
CSA layer, one of an HCA layer. A slot is the fixed block of a running sequence: window rings and tails, where token p
lies at p modulo their length.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

PAGE_TOKENS = 128  # lcm(4, 128), so that every layer's entries fill a page exactly (report 3.6)


class Closing(NamedTuple):
    """The blocks of one ratio that a step completes, in flat order.

    token: [C] int32, the flat index of each block's last token; its entry is ``position[token] // ratio``.
    """

    token: torch.Tensor


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
