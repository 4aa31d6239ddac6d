"""What a call is asked to do, and to tell, about one of its layers besides its output: training reads and steers here.

Records travel beside the state, one for each layer, and one for the MTP block's own call. They never change the
logits, unless they force the routing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dsv4.config.model import RATIO
from dsv4.model import rows
from dsv4.ops.shapes import check_range


@dataclass(frozen=True)
class IndexerRequest:
    """What CSA layers shall find out about their indexers.

    weights: [B, T] float32, what each query's divergence weighs in the loss; a query of weight 0, such as padding, is
    not measured either. learn: form the loss, from every query, with its gradient; else only sampled queries are
    looked at, without one. sample_queries: the last of every so many queries is sampled, for recall in any case.
    """

    weights: torch.Tensor
    learn: bool
    sample_queries: int

    def __post_init__(self) -> None:
        if self.sample_queries < 1:
            raise ValueError(f"sample_queries is {self.sample_queries}; expected at least 1")

    @property
    def sampled(self) -> slice:
        """The queries that are sampled."""
        return slice(self.sample_queries - 1, None, self.sample_queries)

    @property
    def measured(self) -> slice:
        """The queries whose divergence is formed."""
        return slice(None) if self.learn else self.sampled


@dataclass(frozen=True)
class IndexerResult:
    """How well one indexer knows the attention of its layer (dsv4.ops.indexer_kl).

    loss: the weighted divergence, a float32 scalar whose gradient reaches this indexer's parameters alone; None
    unless asked to learn. kl, uniform_kl: sums over the measured queries, float32 scalars without gradient; 1 - kl /
    uniform_kl is the share of the attention's information that the indexer captures. num_queries: how many queries that
    is, int64 scalar: those that see an entry. recall: [B, n] float32, of each sampled query, the share of the
    attention's top_k that the indexer picks; NaN where there are no more than top_k entries to choose from.
    """

    loss: torch.Tensor | None
    kl: torch.Tensor
    uniform_kl: torch.Tensor
    num_queries: torch.Tensor
    recall: torch.Tensor


@dataclass
class LayerRecord:
    """One layer's record. The first three are asked by the caller, the rest is answered by the layer.

    forced: [B * T, A] int64, the experts to use instead of choosing any, distinct in a row, in hash layers too; their
    weights come from the affinities of this call. balance_weights: [B, T] float32, each token's weight in the balance
    loss, 0 for padding. indexer: what to find out where there is an indexer.
    chosen: [B * T, A] int64, the experts used. balance: the balance loss (dsv4.ops.balance), a float32 scalar, where
    weights are given and experts are chosen by affinity. indexed: what was found out.
    """

    forced: torch.Tensor | None = None
    balance_weights: torch.Tensor | None = None
    indexer: IndexerRequest | None = None

    chosen: torch.Tensor | None = None
    balance: torch.Tensor | None = None
    indexed: IndexerResult | None = None


def num_indexed(segment_ids: torch.Tensor, is_counted: torch.Tensor | None = None) -> int:
    """Return how many queries of a packed batch see an entry of a CSA layer.

    Those are all but the first m - 1 tokens of each document. segment_ids: [B, T] int64; is_counted: [B, T] bool,
    False for tokens that shall not count, such as padding.
    """
    sees = rows.packed(segment_ids, ()).positions >= RATIO["csa"] - 1
    return int((sees if is_counted is None else sees & is_counted).sum())


def check_records(
    records: Sequence[LayerRecord],
    num_layers: int,
    tokens: tuple[int, int],
    experts: tuple[int, int],
    has_state: bool,
) -> None:
    """Raise ``ValueError`` unless there is a record for each layer and all fit a call of [B, T] ``tokens``.

    experts: the model's number of experts, and how many a token uses.
    """
    if len(records) != num_layers:
        raise ValueError(f"records holds {len(records)} records; expected {num_layers}, one for each layer")
    (B, T), (E, A) = tokens, experts
    for layer, record in enumerate(records):
        if record.forced is not None:
            _check(f"records[{layer}].forced", record.forced, torch.int64, (B * T, A))
            check_range(f"records[{layer}].forced", record.forced, E, f"0 <= expert < {E}")
        if record.balance_weights is not None:
            _check(f"records[{layer}].balance_weights", record.balance_weights, torch.float32, (B, T))
        if record.indexer is not None:
            _check(f"records[{layer}].indexer.weights", record.indexer.weights, torch.float32, (B, T))
            if has_state:
                raise ValueError(f"records[{layer}].indexer and state are both given; expected one of them")


def _check(name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype or tensor.shape != shape:
        raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}; expected {dtype} {list(shape)}")
