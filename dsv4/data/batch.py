"""A batch: rows of packed documents, with the targets and bytes that the loss and bits per byte are made of.

Attention stays inside a document by its segment id (report 4.1: sample-level masking), and so does the target: the
last token of a document, of a row or of a piece has none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

PADDING = -1  # the segment id of padding; as it is a run of its own, no document sees it
NO_TARGET = -1

IsTarget = Callable[[np.ndarray], np.ndarray]
"""Says of a piece's token ids [n] which may be predicted, [n] bool."""


@dataclass(frozen=True, eq=False)
class Batch:
    """B rows of T tokens.

    token_ids: [B, T] int64. segment_ids: [B, T] int64, runs of equal ids are documents, -1 is padding. targets:
    [B, T] int64, the next token of the same document, -1 where there is none or it is not to be predicted. num_bytes:
    UTF-8 bytes of the text that the targets stand for, special tokens none: bits per byte = sum of nll / ln 2 /
    num_bytes.
    """

    token_ids: torch.Tensor
    segment_ids: torch.Tensor
    targets: torch.Tensor
    num_bytes: int

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        tensors = (tensor.to(device) for tensor in (self.token_ids, self.segment_ids, self.targets))
        return Batch(*tensors, num_bytes=self.num_bytes)

    @property
    def num_tokens(self) -> int:
        """B T, padding included."""
        return self.token_ids.numel()

    @property
    def num_targets(self) -> int:
        """Tokens that are predicted."""
        return int((self.targets != NO_TARGET).sum())

    @property
    def num_real(self) -> int:
        """Tokens that are not padding."""
        return int((self.segment_ids != PADDING).sum())

    @property
    def utilisation(self) -> float:
        """Share of tokens that are not padding."""
        return self.num_real / self.num_tokens


def batch_of(
    rows: Sequence[Sequence[np.ndarray]],
    sequence: int,
    *,
    padding_token: int,
    token_bytes: np.ndarray,
    is_target: IsTarget | None = None,
) -> Batch:
    """Lay rows of pieces, each 1-D integer token ids, into a batch of ``sequence`` tokens a row.

    Every piece becomes a segment, counted from 0 in its row; what a row lacks at its end is padding. token_bytes: [V],
    UTF-8 bytes of each token. is_target: None for all that have a predecessor in their piece.
    """
    token_ids = np.full((len(rows), sequence), padding_token, dtype=np.int64)
    segment_ids = np.full_like(token_ids, PADDING)
    is_wanted = np.ones(token_ids.shape, dtype=bool)
    for row, pieces in enumerate(rows):
        lengths = [len(piece) for piece in pieces]
        token_ids[row, : sum(lengths)] = np.concatenate(pieces)
        segment_ids[row, : sum(lengths)] = np.repeat(np.arange(len(pieces)), lengths)
        if is_target is not None:
            is_wanted[row, : sum(lengths)] = np.concatenate([is_target(piece) for piece in pieces])
    targets = np.full_like(token_ids, NO_TARGET)
    goes_on = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] != PADDING)  # [B, T - 1]
    goes_on &= is_wanted[:, 1:]
    targets[:, :-1][goes_on] = token_ids[:, 1:][goes_on]
    return Batch(
        token_ids=torch.from_numpy(token_ids),
        segment_ids=torch.from_numpy(segment_ids),
        targets=torch.from_numpy(targets),
        num_bytes=int(token_bytes[targets[targets != NO_TARGET]].sum(dtype=np.int64)),
    )
