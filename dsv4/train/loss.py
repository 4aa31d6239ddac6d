"""The loss of a step, micro-batch by micro-batch (report 2.1, 4.2.2).

    next token + mtp_weight * MTP + balance_weight * balance + indexer_weight * KL of the indexers

With a teacher the first part is (1 - weight) * next token + weight * KL to the teacher, by ``distill.weight``, over the
same targets; the others stay as they are. MTP has no teacher.

Each part is a mean over the whole step: its sum is divided by a count over all micro-batches, so that any division
into micro-batches has the same gradient. The indexers' KL is a mean over queries, summed over layers; it reaches them
alone, and nothing else reaches them. In an indexer's warm-up it is the only part.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dsv4.config.train import TrainConfig
from dsv4.data.batch import PADDING, Batch
from dsv4.model.call import Call
from dsv4.model.record import IndexerRequest, LayerRecord, num_indexed
from dsv4.model.transformer import Transformer
from dsv4.ops.backend import resolve
from dsv4.ops.cross_entropy import cross_entropy
from dsv4.train.schedule import Plan
from dsv4.train.teacher import mean_kl


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What a step's sums are divided by: its targets, MTP targets, real tokens, those with a next one in their
    document, queries that see a CSA entry.
    """

    targets: int
    mtp_targets: int
    tokens: int
    joined: int
    indexed: int


def count(batches: list[Batch]) -> Counts:
    """Count a step's micro-batches. Raises ``ValueError`` where nothing is to be predicted."""
    targets = sum(batch.num_targets for batch in batches)
    if targets == 0:
        raise ValueError("the step's batches have no target; expected documents of at least two tokens")
    return Counts(
        targets=targets,
        mtp_targets=sum(int((mtp_targets(batch.targets) >= 0).sum()) for batch in batches),
        tokens=sum(batch.num_real for batch in batches),
        joined=sum(int((_mtp_segments(batch) != PADDING).sum()) for batch in batches),
        indexed=sum(num_indexed(batch.segment_ids, batch.segment_ids != PADDING) for batch in batches),
    )


def mtp_targets(targets: torch.Tensor) -> torch.Tensor:
    """From the next tokens [B, T] the ones after, [B, T - 1], -1 where either is missing."""
    return torch.where(targets[:, :-1] >= 0, targets[:, 1:], -1)


class Sums:
    """Adds up what a step found out, on the device; read once, at the end."""

    def __init__(self, model: Transformer, *, has_teacher: bool) -> None:
        device = model.embed.weight.device
        self.has_mtp, self.has_teacher = len(model.mtp) > 0, has_teacher
        self.num_layers = len(model.layers)
        self.load = torch.zeros(self.num_layers + len(model.mtp), model.config.moe.num_experts, device=device)
        self.loss, self.mtp, self.distill_kl, self.balance = torch.zeros(4, device=device).unbind()
        self.kl, self.uniform_kl = torch.zeros(2, device=device).unbind()
        self.queries = torch.zeros((), dtype=torch.int64, device=device)
        self.recall: list[torch.Tensor] = []
        self.balanced_layers = sum(1 for layer in range(len(model.layers)) if not model.config.is_hash_layer(layer))
        self.balanced_layers += len(model.mtp)

    def add(self, records: list[LayerRecord], batch: Batch) -> None:
        """Take in the records of one micro-batch. Padding is no load."""
        is_real = [batch.segment_ids != PADDING] * self.num_layers
        is_real += [_mtp_segments(batch)[:, :-1] != PADDING] * self.has_mtp
        for layer, record in enumerate(records):
            if record.chosen is not None:
                real = is_real[layer].flatten()[:, None].expand_as(record.chosen)
                # Whole numbers, exact in any order; to list the real ones would make an accelerator wait.
                self.load[layer].scatter_add_(0, record.chosen.flatten(), real.flatten().to(self.load.dtype))
            if record.balance is not None:
                self.balance += record.balance.detach()
            if record.indexed is not None:
                self.kl += record.indexed.kl
                self.uniform_kl += record.indexed.uniform_kl
                self.queries += record.indexed.num_queries
                self.recall.append(record.indexed.recall)

    def are_finite(self) -> bool:
        return bool(torch.stack([self.loss, self.mtp, self.distill_kl, self.balance, self.kl]).isfinite().all())

    def numbers(self, *, trains_all: bool) -> dict[str, float | None]:
        """The step's means. captured: the share of the attention's information that the indexers hold.

        ``distill_kl`` is there if there is a teacher.
        """
        recall = torch.cat([one.flatten() for one in self.recall]) if self.recall else torch.zeros(0)
        recall = recall[~recall.isnan()]
        queries, uniform = int(self.queries), float(self.uniform_kl)
        return {
            "loss": float(self.loss),
            "mtp_loss": float(self.mtp) if trains_all and self.has_mtp else None,
            **({"distill_kl": float(self.distill_kl) if trains_all else None} if self.has_teacher else {}),
            "balance_loss": float(self.balance) / max(1, self.balanced_layers),
            "indexer_kl": float(self.kl) / queries if queries else None,
            "indexer_captured": 1 - float(self.kl) / uniform if uniform > 0 else None,
            "indexer_recall": float(recall.mean()) if recall.numel() else None,
        }


def backward(
    model: Transformer,
    batch: Batch,
    now: Plan,
    config: TrainConfig,
    counts: Counts,
    forced: list[torch.Tensor] | None,
    sums: Sums,
    teacher: Transformer | None = None,
) -> None:
    """Add one micro-batch's share of the step's gradients, and of its sums."""
    trains_all = now.phase.train == "all"
    records = _records(model, batch, now, config, counts, forced)
    streams, call = model.run(
        batch.token_ids, segment_ids=batch.segment_ids, dense=now.is_dense, records=records[: len(model.layers)]
    )
    parts = []
    with torch.set_grad_enabled(trains_all):
        hidden = model.hidden(streams)
        if teacher is None or not trains_all:
            main = _mean_nll(model, hidden, batch.targets, counts.targets)
            sums.loss += main.detach()
            parts.append(main)
        else:
            parts += _taught(model, hidden, batch, config, counts, sums, teacher)
        if trains_all and sums.has_mtp:
            mtp = _mtp_loss(model, streams, call, batch, counts, records[-1])
            sums.mtp += mtp.detach()
            parts.append(now.mtp_weight * mtp)
    if trains_all:
        parts += [config.loss.balance_weight * r.balance for r in records if r.balance is not None]
    else:
        parts = []
    weight = config.loss.indexer_weight if trains_all else 1.0
    parts += [weight * r.indexed.loss for r in records if r.indexed is not None and r.indexed.loss is not None]
    total = torch.stack([part.float() for part in parts]).sum()
    total.backward()
    sums.add(records, batch)


@torch.no_grad()
def choose(model: Transformer, batch: Batch, now: Plan, forced: list[torch.Tensor] | None = None) -> list[torch.Tensor]:
    """The experts every layer chooses for a batch, or is forced to take, the MTP block's last: [B * T, A] each."""
    num_layers = len(model.layers) + len(model.mtp)
    records = [LayerRecord(forced=experts) for experts in forced or [None] * num_layers]
    streams, call = model.run(
        batch.token_ids, segment_ids=batch.segment_ids, dense=now.is_dense, records=records[: len(model.layers)]
    )
    if len(model.mtp):
        model.mtp_hidden(streams, call, _mtp_segments(batch), records[-1])
    chosen = [record.chosen for record in records]
    assert all(x is not None for x in chosen)
    return [x for x in chosen if x is not None]


def _records(
    model: Transformer, batch: Batch, now: Plan, config: TrainConfig, counts: Counts, forced: list[torch.Tensor] | None
) -> list[LayerRecord]:
    """One record a layer, the MTP block's last, whose call is a token shorter."""
    is_real = (batch.segment_ids != PADDING).float()  # [B, T]
    learns = now.phase.train == "indexer" or not now.is_dense
    request = IndexerRequest(
        weights=is_real / max(1, counts.indexed), learn=learns, sample_queries=config.run.sample_queries
    )
    balance = mtp_balance = None
    if now.phase.train == "all":
        balance = is_real / counts.tokens
        mtp_balance = (_mtp_segments(batch)[:, :-1] != PADDING) / counts.joined
    records = [LayerRecord(balance_weights=balance, indexer=request) for _ in model.layers]
    records += [LayerRecord(balance_weights=mtp_balance) for _ in model.mtp]
    if forced is not None:
        for record, chosen in zip(records, forced, strict=True):
            record.forced = chosen
    return records


def _taught(
    model: Transformer,
    hidden: torch.Tensor,
    batch: Batch,
    config: TrainConfig,
    counts: Counts,
    sums: Sums,
    teacher: Transformer,
) -> list[torch.Tensor]:
    """The next token's loss and the KL to the teacher, each times its share; hidden: [B, T, D]."""
    weight = config.distill.weight
    with torch.set_grad_enabled(weight < 1):  # measured, even where it teaches nothing
        main = _mean_nll(model, hidden, batch.targets, counts.targets)
    kl = mean_kl(model, hidden, teacher, batch, _target_weights(batch.targets, counts.targets))
    sums.loss += main.detach()
    sums.distill_kl += kl.detach()
    return [(1 - weight) * main, weight * kl]


def _mtp_loss(
    model: Transformer, streams: torch.Tensor, call: Call, batch: Batch, counts: Counts, record: LayerRecord
) -> torch.Tensor:
    hidden = model.mtp_hidden(streams, call, _mtp_segments(batch), record)  # [B, T - 1, D]
    return _mean_nll(model, hidden, mtp_targets(batch.targets), counts.mtp_targets)


def _mtp_segments(batch: Batch) -> torch.Tensor:
    """Segments [B, T] as the MTP block sees them: where a document has no next token to join, there is padding.

    It would join the first token of the next document, and count in the balance of this one.
    """
    segments = batch.segment_ids
    result = torch.full_like(segments, PADDING)
    result[:, :-1] = segments[:, :-1].where(segments[:, 1:] == segments[:, :-1], PADDING)
    return result


def _target_weights(targets: torch.Tensor, total: int) -> torch.Tensor:
    """What makes a sum over tokens a mean over ``total`` targets; -1 is no target."""
    return (targets >= 0).float() / max(1, total)


def _mean_nll(model: Transformer, hidden: torch.Tensor, targets: torch.Tensor, total: int) -> torch.Tensor:
    """This micro-batch's share of the mean over ``total`` targets; -1 is no target."""
    weights = _target_weights(targets, total)
    backend = resolve(model.backend, hidden.device)
    loss, _ = cross_entropy(
        hidden.flatten(0, 1),
        model.head.matrix(hidden.dtype, backend),
        targets.clamp(min=0).flatten(),
        weights.flatten(),
        backend=backend,
    )
    return loss
