"""The router on the CPU as one C kernel (``native/route.c``), where no gradient is wanted."""

from __future__ import annotations

import torch

from dsv4 import native

FEW = 8  # tokens that are not worth splitting over threads


def route(
    logits: torch.Tensor, bias: torch.Tensor | None, chosen: torch.Tensor | None, num_choices: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``dsv4.ops.route.route``."""
    T, E = logits.shape
    weights = logits.new_empty(T, num_choices)
    if chosen is None:
        chosen = torch.empty(T, num_choices, dtype=torch.int64, device=logits.device)
    else:
        bias, chosen = None, chosen.contiguous()
    threads = torch.get_num_threads() if T >= FEW else 1
    native.call("dsv4_route", T, E, num_choices, threads, scale, logits.contiguous(), bias, chosen, weights)
    return chosen, weights
