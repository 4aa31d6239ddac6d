"""Entries of a training row on a GPU, from projections to what attention sees, with gradients or without.

Flash and Pro have the same widths. The portable twin and the kernels one by one also write what lies between the steps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.gpu.case import BANDWIDTH, Case
from dsv4.device import best
from dsv4.ops.backend import Backend
from dsv4.ops.compress import entries, pool
from dsv4.ops.lowbit import round_entries
from dsv4.ops.rmsnorm import rmsnorm
from dsv4.ops.rope import rotate

ROTARY, EPS = 64, 1e-6
KINDS = {"hca": (128, 512, False), "csa": (4, 512, True), "indexer": (4, 128, True)}  # ratio, channels, overlap
TOKENS = (4096, 65536)


def cases() -> list[Case]:
    """Each kind at a batch of one row, short and long."""
    return [
        _case(name, tokens, has_gradients) for name in KINDS for tokens in TOKENS for has_gradients in (False, True)
    ]


def _case(name: str, tokens: int, has_gradients: bool) -> Case:
    ratio, channels, overlap = KINDS[name]
    given = 4 * 2 * tokens * channels * (2 if overlap else 1)  # bytes of values and gates, float32
    made = 2 * tokens // ratio * channels

    def maker(backend: Backend, *, at_once: bool = True) -> Callable[[], Callable[[], object]]:
        return lambda: _make(name, tokens, has_gradients, backend, at_once)

    return Case(
        kernel="compress.entries" + (" with gradients" if has_gradients else ""),
        shape=f"flash and pro {name} {tokens} tokens",
        num_bytes=3 * given + 2 * made if has_gradients else given + made,
        mark=BANDWIDTH,
        make=maker("unproved"),
        twins={"portable": maker("portable"), "one by one": maker("unproved", at_once=False)},
    )


def _make(name: str, tokens: int, has_gradients: bool, backend: Backend, at_once: bool) -> Callable[[], object]:
    (ratio, channels, overlap), device = KINDS[name], best()
    blocks, width, is_index = tokens // ratio, channels * (2 if overlap else 1), name == "indexer"
    kv, gate = (torch.randn(1, blocks, ratio, width, device=device) for _ in range(2))
    bias, weight = torch.randn(ratio, width, device=device), torch.ones(channels, device=device, dtype=torch.bfloat16)
    leaves = [x.requires_grad_(has_gradients) for x in (kv, gate, bias, weight)]
    angle = torch.randn(1, blocks, ROTARY // 2, device=device)
    grad = torch.randn(1, blocks, channels, device=device, dtype=torch.bfloat16)
    turn = angle.cos(), angle.sin()

    def run() -> object:
        if at_once:
            made = entries(
                kv, gate, bias, weight, *turn, overlap=overlap, eps=EPS, dtype=torch.bfloat16, is_index=is_index,
                rounds=True, backend=backend,
            )  # fmt: skip
        else:
            pooled = pool(kv, gate, bias, overlap=overlap, backend=backend).bfloat16()
            turned = rotate(rmsnorm(pooled, weight, EPS, backend=backend), *turn, backend=backend)
            made = round_entries(turned, ROTARY, is_index=is_index, backend=backend)
        return torch.autograd.grad(made, leaves, grad) if has_gradients else made

    return run
