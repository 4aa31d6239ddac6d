"""One thing that is timed on a GPU: a kernel at a true shape, its twins, and what it must move and compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

Run = Callable[[], object]

BANDWIDTH = 0.75  # of the speed of copies: what mHC, compression and casts should reach on one H200
ATTENTION, ATTENTION_BACKWARD = 0.45, 0.3  # of the rate of bfloat16 products
EXPERTS = 0.6  # of the same, from 4096 tokens
INDEX = 0.5  # of its bound: within twice


@dataclass(frozen=True, kw_only=True)
class Case:
    """``make`` makes inputs and gives what is run on them, again and again.

    kernel: what is called, such as ``mhc.pre``; shape: such as ``flash 4096 tokens``. num_bytes: what must be read and
    written at least; flops: of multiplications and additions that must be done. twins: the same work by others, made
    from the same random numbers. mark: the share of what the device can do that it should reach.
    """

    kernel: str
    shape: str
    make: Callable[[], Run]
    num_bytes: int
    flops: int = 0
    twins: dict[str, Callable[[], Run]] = field(default_factory=dict)
    mark: float | None = None

    @property
    def name(self) -> str:
        return f"{self.kernel}, {self.shape}"


def compiled(make: Callable[[], Run]) -> Callable[[], Run]:
    """What torch.compile makes of a twin, or of the specification.

    It begins anew each time: of one function it compiles few variants, and runs the rest as they are without a word.
    """

    def made() -> Run:
        torch.compiler.reset()
        return torch.compile(make())

    return made
