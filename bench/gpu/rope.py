"""Rotations of queries and keys, with their norms, and of outputs back, judged by the bytes of what goes in and out."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.gpu.case import BANDWIDTH, Case
from dsv4.device import best
from dsv4.ops.backend import Backend
from dsv4.ops.lowbit import round_entries
from dsv4.ops.rmsnorm import rmsnorm
from dsv4.ops.rope import rotate, rotate_normed, rotate_unit

TOKENS, CHANNELS, ROTARY, EPS = 4096, 512, 64, 1e-6
HEADS = {"flash": 64, "pro": 128}


def cases() -> list[Case]:
    """Queries, normalised and rotated, and outputs rotated back; with gradients, too; and keys, rounded as well."""
    of_heads = [
        _case(model, name, backward)
        for model in HEADS
        for name in ("rotate_unit", "rotate")
        for backward in (False, True)
    ]
    return [*of_heads, _of_keys(TOKENS, False), _of_keys(TOKENS, True), _of_keys(1, False)]


def _case(model: str, name: str, backward: bool) -> Case:
    def maker(backend: Backend) -> Callable[[], Callable[[], object]]:
        return lambda: _make(HEADS[model], name, backward, backend)

    tensors = 5 if backward else 2  # backward reads the gradient and x, and writes x's gradient
    return Case(
        kernel=f"rope.{name}" + (" and backward" if backward else ""),
        shape=f"{model} {TOKENS} tokens",
        make=maker("unproved"),
        num_bytes=tensors * TOKENS * HEADS[model] * CHANNELS * 2,
        twins={"portable": maker("portable")},
        mark=BANDWIDTH,
    )


def _of_keys(tokens: int, backward: bool) -> Case:
    def maker(backend: Backend, at_once: bool = True) -> Callable[[], Callable[[], object]]:
        return lambda: _make_keys(tokens, backward, backend, at_once)

    return Case(
        kernel="rope.rotate_normed" + (" and backward" if backward else ""),
        shape=f"flash and pro {tokens} tokens",
        make=maker("unproved"),
        num_bytes=(5 if backward else 2) * tokens * CHANNELS * 2,
        twins={"portable": maker("portable"), "one by one": maker("unproved", at_once=False)},
        mark=BANDWIDTH if tokens == TOKENS else None,
    )


def _make_keys(tokens: int, backward: bool, backend: Backend, at_once: bool) -> Callable[[], object]:
    x, grad = (torch.randn(1, tokens, CHANNELS, device=best(), dtype=torch.bfloat16) for _ in range(2))
    weight = torch.ones(CHANNELS, device=best(), dtype=torch.bfloat16)
    cos, sin = (torch.randn(1, tokens, ROTARY // 2, device=best()) for _ in range(2))
    leaves = [leaf.requires_grad_(backward) for leaf in (x, weight)]

    def run() -> torch.Tensor:
        if at_once:
            return rotate_normed(x, weight, cos, sin, EPS, rounds=True, backend=backend)
        turned = rotate(rmsnorm(x, weight, EPS, backend=backend), cos, sin, backend=backend)
        return round_entries(turned, ROTARY, backend=backend)

    return (lambda: torch.autograd.grad(run(), leaves, grad)) if backward else run


def _make(heads: int, name: str, backward: bool, backend: Backend) -> Callable[[], object]:
    x, grad = (torch.randn(1, TOKENS, heads, CHANNELS, device=best(), dtype=torch.bfloat16) for _ in range(2))
    cos, sin = (torch.randn(1, TOKENS, ROTARY // 2, device=best()) for _ in range(2))

    def run() -> torch.Tensor:
        if name == "rotate":
            return rotate(x, cos, sin, inverse=True, backend=backend)
        return rotate_unit(x, cos, sin, EPS, backend=backend)

    x.requires_grad_(backward)
    return (lambda: torch.autograd.grad(run(), x, grad)) if backward else run
