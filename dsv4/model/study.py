"""How well an indexer knows the attention of its own layer: measured where both are at hand."""

from __future__ import annotations

from typing import NamedTuple

import torch

from dsv4.model.record import IndexerRequest, IndexerResult
from dsv4.model.rows import Blocks
from dsv4.ops import index
from dsv4.ops.attend import Entries
from dsv4.ops.backend import Backend
from dsv4.ops.indexer_kl import indexer_kl, recall


class Projection(NamedTuple):
    """What an indexer makes of a call: queries [B, T, I, J], keys [B, C, J], head weights [B, T, I]."""

    q: torch.Tensor
    k: torch.Tensor
    weights: torch.Tensor

    def at(self, queries: slice) -> Projection:
        """The same of some queries."""
        return Projection(self.q[:, queries], self.k, self.weights[:, queries])


class Attended(NamedTuple):
    """What ``attend`` was given of entries, and its log-sum-exp: q [B, T, H, K], log_sum_exp [B, T, H]."""

    q: torch.Tensor
    entries: Entries
    log_sum_exp: torch.Tensor
    scale: float

    def at(self, queries: slice) -> Attended:
        """The same of some queries."""
        seen = (None if x is None else x[:, queries] for x in self.entries[1:])
        entries = Entries(self.entries.values, *seen)
        return Attended(self.q[:, queries], entries, self.log_sum_exp[:, queries], self.scale)


def study(
    request: IndexerRequest,
    projection: Projection,
    attended: Attended,
    blocks: Blocks,
    top_k: int,
    *,
    backend: Backend,
) -> IndexerResult:
    """Hold the projection of the request's measured queries to the attention of all."""
    now = request.measured
    weights = request.weights[:, now]
    q, entries, log_sum_exp, scale = attended.at(now)
    loss, kl, uniform_kl = indexer_kl(*projection, q, entries, log_sum_exp, weights, scale=scale, backend=backend)
    is_counted = weights > 0
    sees = blocks.end[:, now] > blocks.begin[:, now]
    sampled = projection.at(request.sampled) if request.learn else projection
    return IndexerResult(
        loss=loss if request.learn else None,
        kl=(kl * is_counted).sum(),
        uniform_kl=(uniform_kl * is_counted).sum(),
        num_queries=(sees & is_counted).sum(),
        recall=_recall(request, sampled, attended, blocks, top_k, backend),
    )


def _recall(
    request: IndexerRequest,
    projection: Projection,
    attended: Attended,
    blocks: Blocks,
    top_k: int,
    backend: Backend,
) -> torch.Tensor:
    """The projection is of the sampled queries."""
    now = request.sampled
    begin, end = blocks.begin[:, now], blocks.end[:, now]
    q, (values, picked, _, _), log_sum_exp, scale = attended.at(now)
    if picked is None:
        picked = index.select(*projection, begin, end, top_k, backend=backend)
    counted = Entries(values, begin=begin, end=end.where(request.weights[:, now] > 0, begin))
    return recall(q, counted, log_sum_exp, picked, scale=scale, backend=backend)
