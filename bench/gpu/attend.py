"""Attention of a training step, of Flash (64 heads), Pro (128) and mini (8), with picks (CSA) or all entries (HCA)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.gpu.case import ATTENTION, ATTENTION_BACKWARD, Case
from dsv4.device import best
from dsv4.ops.attend import Entries, attend
from dsv4.ops.backend import Backend

WINDOW = 128
MODELS = {"mini": (8, 256, 256), "flash": (64, 512, 512), "pro": (128, 512, 1024)}  # heads, channels, picks
RATIO = {"csa": 4, "hca": 128}
NUM_TOKENS = (4096, 65536)
BYTES = 2  # of an element, bfloat16
BALANCE = 165  # operations a byte of an H200: 790 TFLOP/s of bfloat16 over 4.8 TB/s


def cases() -> list[Case]:
    """Forward, and with backward, of each model and kind of layer at each number of tokens, mini at the fewest."""
    return [
        _case(model, kind, num_tokens, backward)
        for num_tokens in NUM_TOKENS
        for model in MODELS
        if model != "mini" or num_tokens == NUM_TOKENS[0]
        for kind in RATIO
        for backward in (False, True)
    ]


def _case(model: str, kind: str, num_tokens: int, backward: bool) -> Case:
    heads, channels, picks = MODELS[model]
    own = torch.arange(num_tokens) + 1
    entries = own // RATIO[kind]
    if kind == "csa":
        entries = entries.clamp(max=picks)
    num_keys = int((own.clamp(max=WINDOW) + entries).sum())
    # A product with a key takes 2 K: two of them in forward (scores, mix), five in backward (scores again, gradients of
    # weights, then the gradient of the query and the two of the key).
    flops = num_keys * heads * 2 * channels * (7 if backward else 2)
    # Queries and outputs are read and written once, with backward four more times (queries, outputs, two gradients).
    queries = num_tokens * heads * channels * BYTES * (6 if backward else 2)
    keys = num_tokens * (1 + 1 / RATIO[kind]) * channels * BYTES * (3 if backward else 1)
    indices = num_tokens * (picks if kind == "csa" else 2) * 8 * (2 if backward else 1)
    num_bytes = int(queries + keys + indices)

    def maker(backend: Backend) -> Callable[[], Callable[[], object]]:
        return lambda: _make(model, kind, num_tokens, backward, backend)

    return Case(
        kernel=f"attend.{kind}" + (".backward" if backward else ""),
        shape=f"{model} {num_tokens} tokens",
        make=maker("unproved"),
        num_bytes=num_bytes,
        flops=flops,
        twins={"portable": maker("portable")},
        mark=None if model == "mini" else ATTENTION_BACKWARD if backward else ATTENTION,
    )


def _make(model: str, kind: str, num_tokens: int, backward: bool, backend: Backend) -> Callable[[], object]:
    device, (heads, channels, picks) = best(), MODELS[model]

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.bfloat16, device=device).requires_grad_(backward)

    q, kv = random(1, num_tokens, heads, channels), random(1, num_tokens, channels)
    values = random(1, num_tokens // RATIO[kind], channels)
    sink = torch.zeros(heads, device=device, requires_grad=backward)
    raw_begin = torch.zeros(1, num_tokens, dtype=torch.int64, device=device)
    end = (torch.arange(num_tokens, device=device)[None] + 1) // RATIO[kind]
    if kind == "csa":
        entries = Entries(values, picked=_spread(end, picks))
    else:
        entries = Entries(values, begin=torch.zeros_like(end), end=end)
    grad = torch.randn_like(q) if backward else None

    def run() -> object:
        out, _ = attend(q, kv, sink, raw_begin, entries, window=WINDOW, scale=channels**-0.5, backend=backend)
        return out if grad is None else torch.autograd.grad(out, (q, kv, sink, values), grad)

    return run


def _spread(end: torch.Tensor, picks: int) -> torch.Tensor:
    """All entries of a query if they are no more than its picks, or else as many, evenly over them: [1, T, P]."""
    place = torch.arange(picks, device=end.device)
    end = end[..., None]
    spread = place * end // picks
    return torch.where(end > picks, spread, torch.where(place < end, place, -1))
