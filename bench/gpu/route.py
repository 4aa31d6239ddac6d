"""Choosing experts and their weights: affinities, the best of them and their shares, judged by the bytes of logits."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.gpu.case import Case
from dsv4.device import best
from dsv4.ops.backend import Backend
from dsv4.ops.route import affinity, route

TOKENS = (64, 4096)
EXPERTS = {"flash": 256, "pro": 384}
CHOICES, SCALE = 6, 2.5


def cases() -> list[Case]:
    """The choice as an engine makes it, and the affinities of training with their gradient."""
    return [_case(model, tokens, name) for model in EXPERTS for tokens in TOKENS for name in ("route", "affinity")]


def _case(model: str, tokens: int, name: str) -> Case:
    def maker(backend: Backend) -> Callable[[], Callable[[], object]]:
        return lambda: _make(tokens, EXPERTS[model], name, backend)

    logits = tokens * EXPERTS[model] * 4
    return Case(
        kernel=f"route.{name}" + (" and backward" if name == "affinity" else ""),
        shape=f"{model} {tokens} tokens",
        make=maker("unproved"),
        num_bytes=5 * logits if name == "affinity" else logits + tokens * CHOICES * 12,
        twins={"portable": maker("portable")},
    )


def _make(tokens: int, experts: int, name: str, backend: Backend) -> Callable[[], object]:
    logits, grad = (torch.randn(tokens, experts, device=best()) for _ in range(2))
    bias = torch.randn(experts, device=best())
    if name == "route":
        return lambda: route(logits, bias, None, CHOICES, SCALE, backend=backend)
    logits.requires_grad_()
    return lambda: torch.autograd.grad(affinity(logits, backend=backend), logits, grad)
