"""Batches of random packed documents, and steps over them, for the tests of training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dsv4.config.train import Phase
from dsv4.data.batch import Batch, batch_of
from dsv4.train.anticipatory import Work
from dsv4.train.schedule import Plan, Position

PADDING_TOKEN = 1


def packed_batch(vocab_size: int, lengths: Sequence[Sequence[int]], sequence: int, seed: int = 0) -> Batch:
    """Return rows of random documents of these lengths; what a row lacks of ``sequence`` tokens is padding."""
    random = np.random.default_rng(seed)
    rows = [[random.integers(vocab_size, size=length) for length in row] for row in lengths]
    token_bytes = np.full(vocab_size, 3, dtype=np.int64)
    return batch_of(rows, sequence, padding_token=PADDING_TOKEN, token_bytes=token_bytes)


def split(batch: Batch, sizes: Sequence[int]) -> list[Batch]:
    """Divide a batch into micro-batches of so many rows each."""
    fields = (batch.token_ids, batch.segment_ids, batch.targets)
    parts = zip(*(field.split(list(sizes)) for field in fields), strict=True)
    return [Batch(*part, num_bytes=3 * int((part[2] >= 0).sum())) for part in parts]


def work_of(
    phase: Phase, batches: Sequence[Batch], *, step: int = 1, lr: float = 1e-3, mtp_weight: float = 0.3
) -> Work:
    """Return step number ``step`` of a phase, over these micro-batches."""
    rows = [len(batch.token_ids) for batch in batches]
    now = Plan(
        step=step, phase=phase, is_first=step == 1, is_last=False, rows=sum(rows), micro_rows=max(rows), lr=lr,
        mtp_weight=mtp_weight,
    )  # fmt: skip
    return Work(plan=now, position=Position(), loader_state={}, batches=list(batches))
