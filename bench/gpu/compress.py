"""Pooling on a GPU: entries of 128 tokens, overlapped ones of 4, and those of the indexer, with gradients or without.

Flash and Pro have the same widths.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.gpu.case import BANDWIDTH, Case
from dsv4.device import best
from dsv4.ops.compress import portable, triton

KINDS = {"hca": (128, 512, False), "csa": (4, 512, True), "indexer": (4, 128, True)}  # ratio, channels, overlap
TOKENS = (4096, 65536)


def cases() -> list[Case]:
    """Each kind at a batch of one row, short and long."""
    return [
        _case(name, tokens, has_gradients) for name in KINDS for tokens in TOKENS for has_gradients in (False, True)
    ]


def _case(name: str, tokens: int, has_gradients: bool) -> Case:
    ratio, channels, overlap = KINDS[name]
    given = 4 * 2 * tokens * channels * (2 if overlap else 1)  # bytes of values and scores, float32
    entries = 4 * tokens // ratio * channels
    operation = "pool_overlapped" if overlap else "pool_plain"
    return Case(
        kernel=f"compress.{operation}" + (" with gradients" if has_gradients else ""),
        shape=f"flash and pro {name} {tokens} tokens",
        num_bytes=3 * given + 2 * entries if has_gradients else given + entries,
        mark=BANDWIDTH,
        make=_maker(getattr(triton, operation), name, tokens, has_gradients),
        twins={"portable": _maker(getattr(portable, operation), name, tokens, has_gradients)},
    )


def _maker(operation: Callable, name: str, tokens: int, has_gradients: bool) -> Callable[[], Callable[[], object]]:
    ratio, channels, overlap = KINDS[name]
    blocks = tokens // ratio

    def make() -> Callable[[], object]:
        shape = 1, blocks, ratio, channels * (2 if overlap else 1)
        kv, score = (torch.randn(shape, device=best(), requires_grad=has_gradients) for _ in range(2))
        is_first = torch.arange(blocks, device=best())[None] == 0
        grad = torch.randn(1, blocks, channels, device=best())
        rest = (is_first,) if overlap else ()

        def run() -> object:
            entries = operation(kv, score, *rest)
            return torch.autograd.grad(entries, (kv, score), grad) if has_gradients else entries

        return run

    return make
