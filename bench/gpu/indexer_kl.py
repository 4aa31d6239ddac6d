"""The indexer's loss of a CSA layer of Flash and Pro: over all entries, as it warms up, and over those picked."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.gpu.case import Case
from dsv4.device import best
from dsv4.ops.attend import Entries
from dsv4.ops.backend import Backend
from dsv4.ops.indexer_kl import indexer_kl

I, J, K, RATIO = 64, 128, 512, 4  # noqa: E741
MODELS = {"flash": (64, 512), "pro": (128, 1024)}  # heads of attention, picks
NUM_TOKENS = (4096, 16384)
BYTES = 2  # of an element, bfloat16
BALANCE = 165  # operations a byte of an H200
MARK = 0.4


def cases() -> list[Case]:
    """Both kinds with gradients, which they always have in training."""
    return [
        _case(model, kind, num_tokens)
        for num_tokens in NUM_TOKENS
        for model in MODELS
        for kind in ("picked", "interval")
    ]


def _case(model: str, kind: str, num_tokens: int) -> Case:
    heads, picks = MODELS[model]
    seen = (torch.arange(num_tokens) + 1) // RATIO
    pairs = int((seen if kind == "interval" else seen.clamp(max=picks)).sum())
    # Of a query and an entry: the teacher's products; the student's, again in backward, and those of two gradients.
    flops = pairs * 2 * (heads * K + 4 * I * J)
    num_bytes = BYTES * num_tokens * (heads * K + 2 * I * J + (K + 3 * J) // RATIO)
    num_bytes += num_tokens * 8 * (picks if kind == "picked" else 2)

    def maker(backend: Backend) -> Callable[[], Callable[[], object]]:
        return lambda: _make(heads, picks, kind, num_tokens, backend)

    return Case(
        kernel=f"indexer_kl.{kind}",
        shape=f"{model} {num_tokens} tokens",
        make=maker("unproved"),
        num_bytes=num_bytes,
        flops=flops,
        twins={"portable": maker("portable")},
        mark=MARK,
    )


def _make(heads: int, picks: int, kind: str, num_tokens: int, backend: Backend) -> Callable[[], object]:
    device, num_entries = best(), num_tokens // RATIO

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(1, *shape, dtype=torch.bfloat16, device=device)

    index_q, index_k, index_weights = random(num_tokens, I, J), random(num_entries, J), random(num_tokens, I)
    learns = [x.requires_grad_() for x in (index_q, index_k, index_weights)]
    q, values = random(num_tokens, heads, K), random(num_entries, K)
    end = (torch.arange(num_tokens, device=device)[None] + 1) // RATIO
    if kind == "picked":
        place, last = torch.arange(picks, device=device), end[..., None]
        spread = torch.where(last > picks, place * last // picks, torch.where(place < last, place, -1))
        entries = Entries(values, picked=spread)
    else:
        entries = Entries(values, begin=torch.zeros_like(end), end=end)
    log_sum_exp = torch.full((1, num_tokens, heads), 10.0, device=device)
    weights = torch.full((1, num_tokens), 1 / num_tokens, device=device)

    def run() -> object:
        loss, *_ = indexer_kl(
            index_q, index_k, index_weights, q, entries, log_sum_exp, weights, scale=K**-0.5, backend=backend
        )
        return torch.autograd.grad(loss, learns)

    return run
