"""The FLOPs of a step, by the accounting, for the documents it really held."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from dsv4.accounting.cost import total_flops
from dsv4.accounting.flops import prefill, training
from dsv4.config.model import ModelConfig
from dsv4.train.schedule import Plan

if TYPE_CHECKING:
    from dsv4.data.batch import Batch


def step_flops(config: ModelConfig, batches: list[Batch], now: Plan) -> int:
    """Useful matrix-product FLOPs of forward and backward; of the forward alone in an indexer's warm-up.

    Attention is counted as sparse in every phase, padding as a document: what dense attention and the optimiser add is
    work, but not counted as useful.
    """
    lengths: Counter[int] = Counter()
    for batch in batches:
        lengths.update(document_lengths(batch.segment_ids))
    is_main = now.phase.train == "all"
    return sum(count * _flops(config, length, is_main) for length, count in lengths.items())


def document_lengths(segment_ids: torch.Tensor) -> list[int]:
    """Lengths of the runs of equal ids in [B, T], row by row."""
    B, T = segment_ids.shape
    is_start = torch.ones(B, T, dtype=torch.bool, device=segment_ids.device)
    is_start[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    starts = is_start.flatten().nonzero()[:, 0].tolist()
    return [end - start for start, end in zip(starts, [*starts[1:], B * T], strict=True)]


@lru_cache(maxsize=1 << 16)
def _flops(config: ModelConfig, length: int, is_main: bool) -> int:
    return total_flops(training(config, length) if is_main else prefill(config, length))
