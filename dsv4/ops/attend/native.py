"""Attention on the CPU with the softmax and its gradient as one C kernel each (``native/softmax.c``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dsv4 import native
from dsv4.ops.attend import portable
from dsv4.ops.attend.portable import Part, Softmax

if TYPE_CHECKING:
    from dsv4.ops.attend import Entries


def attend(
    q: torch.Tensor,
    kv: torch.Tensor,
    sink: torch.Tensor,
    raw_begin: torch.Tensor,
    entries: Entries | None,
    window: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``dsv4.ops.attend``."""
    values = kv if entries is None else entries.values
    serves = native.serves(q) and q.dtype == kv.dtype == values.dtype
    return portable.run(q, kv, sink, raw_begin, entries, window, scale, SOFTMAX if serves else portable.SOFTMAX)


def _softmax(parts: list[Part], log_sink: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    scores = parts[0].scores
    weights = [torch.empty_like(part.scores, dtype=part.values.dtype) for part in parts]
    total, log_total = scores.new_empty(scores.shape[:3]), scores.new_empty(scores.shape[:3])
    seen = [
        (part.scores.shape[-1], part.scores, part.hidden.contiguous(), p)
        for part, p in zip(parts, weights, strict=True)
    ]
    native.call("dsv4_attention_softmax", *_sizes(parts), log_sink, *_two(seen, 4), total, log_total)
    return weights, total, log_total


def _softmax_backward(
    parts: list[Part], log_sink: torch.Tensor, log_total: torch.Tensor, projected: list[torch.Tensor]
) -> tuple[list[torch.Tensor], torch.Tensor]:
    grad_sink = torch.empty_like(log_total, memory_format=torch.contiguous_format)
    pairs, seen = [], []
    for part, dp in zip(parts, projected, strict=True):
        batch, S, _ = part.values.shape
        per_batch = part.scores.numel() // (S * batch)
        pairs.append(part.values.new_empty(batch, 2 * per_batch, S))
        seen.append((S, part.scores, part.hidden.contiguous(), dp, per_batch, pairs[-1]))
    native.call(
        "dsv4_attention_softmax_backward", *_sizes(parts), log_sink, log_total.contiguous(), *_two(seen, 6), grad_sink
    )
    return pairs, grad_sink


SOFTMAX = Softmax(_softmax, _softmax_backward)


def _sizes(parts: list[Part]) -> tuple[int, ...]:
    n, s, H, _ = parts[0].scores.shape
    return n * s, H, native.is_bfloat16(parts[0].values), torch.get_num_threads()


def _two(seen: list[tuple], width: int) -> tuple:
    """The arguments of both parts, those of a missing second one zero and null."""
    absent = (0, None, None, None, 0, None)[:width]
    return sum([*seen, absent][:2], ())
