"""The indexer's loss over slices of queries, the student's gradients formed in the same pass.

No tensor of tokens x entries exists: a slice holds the scores of its own queries, and what is kept for backward is
three gradients, which backward multiplies by a number. Queries that see an interval share one matrix product with its
entries; picked entries are gathered query by query. Rows lie end to end, so that one slice is like another: an entry
is known by its place among those of all rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from dsv4.ops.attend import Entries

SCORES_HELD = 1 << 20  # scores of one slice for all heads, elements
GATHERED_HELD = 1 << 21  # channels of picked entries gathered for one slice, elements
LOG2_E = math.log2(math.e)


def indexer_kl(
    index_q: torch.Tensor,
    index_k: torch.Tensor,
    index_weights: torch.Tensor,
    q: torch.Tensor,
    entries: Entries,
    log_sum_exp: torch.Tensor,
    query_weights: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See ``dsv4.ops.indexer_kl``."""
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (index_q, index_k, index_weights))
    return _IndexerKL.apply(
        index_q, index_k, index_weights, q, entries, log_sum_exp, query_weights, scale, learns
    )  # fmt: skip


class _Slice(NamedTuple):
    """A few queries, g of one row, and S entries: the same for all of them (b = 1) or each query's own (b = g).

    queries: which of all B * T; places: [b, S] int64, which of all B * C entries; hidden: [g, S] bool.
    """

    queries: slice
    places: torch.Tensor
    hidden: torch.Tensor


def _slices(entries: Entries, num_heads: int, width: int) -> Iterator[_Slice]:
    """Cut the queries of all rows into slices; some that see no entry are left out."""
    B, C = entries.values.shape[:2]
    row = torch.arange(B, device=entries.values.device)[:, None] * C  # [B, 1]: the place of its first entry
    if entries.picked is not None:
        yield from _picked_slices(entries.picked, row, num_heads, width)
    elif C:
        assert entries.begin is not None
        assert entries.end is not None
        begin, end = (bound.clamp(0, C) + row for bound in (entries.begin, entries.end))
        yield from _interval_slices(begin, end, max(1, SCORES_HELD // (num_heads * C)))


def _picked_slices(picked: torch.Tensor, row: torch.Tensor, num_heads: int, width: int) -> Iterator[_Slice]:
    P = picked.shape[2]
    if P == 0:
        return
    places = (picked.clamp(min=0) + row[..., None]).flatten(0, 1)  # [B * T, P]
    hidden = (picked < 0).flatten(0, 1)
    size = max(1, min(SCORES_HELD // (num_heads * P), GATHERED_HELD // (width * P)))
    for first in range(0, len(places), size):
        now = slice(first, first + size)
        yield _Slice(now, places[now], hidden[now])


def _interval_slices(begin: torch.Tensor, end: torch.Tensor, size: int) -> Iterator[_Slice]:
    B, T = begin.shape
    begin, end = begin.reshape(-1, 1), end.reshape(-1, 1)
    for b in range(B):
        for first in range(b * T, (b + 1) * T, size):
            now = slice(first, min(first + size, (b + 1) * T))
            places = torch.arange(int(begin[now].min()), int(end[now].max()), device=begin.device)[None]
            if places.numel():
                yield _Slice(now, places, (places < begin[now]) | (places >= end[now]))


class _Teacher:
    """Attention's side, rows end to end. q: [B * T, H, K]; values: [B * C, K]; log_sum_exp: [B * T, H]."""

    def __init__(self, q: torch.Tensor, entries: Entries, log_sum_exp: torch.Tensor, scale: float) -> None:
        self.q, self.values, self.log_sum_exp = (x.flatten(0, 1) for x in (q, entries.values, log_sum_exp))
        self.scale, self.wide = scale, torch.promote_types(q.dtype, torch.float32)

    def log_mass(self, now: _Slice) -> torch.Tensor:
        """What all heads together give to each entry, as a logarithm: [g, S]. Inside in base 2: exp2 is cheap."""
        q = self.q[now.queries].to(self.wide) * (self.scale * LOG2_E)  # [g, H, K]
        values = _take(self.values, now.places).to(self.wide)  # [b, S, K]
        scores = torch.bmm(q.view(len(values), -1, q.shape[-1]), values.transpose(1, 2))
        scores = scores.view(*q.shape[:2], -1)  # [g, H, S]
        scores -= self.log_sum_exp[now.queries, :, None] * LOG2_E
        peak = scores.amax(dim=1)
        return scores.sub_(peak[:, None]).exp2_().sum(dim=1).log2_().add_(peak).div_(LOG2_E)


class _Student:
    """The indexer's side, rows end to end, and its gradients, all 0 at first.

    q: [B * T, I, J]; k: [B * C, J]; weights: [B * T, I]. The gradient of k, a sum over slices, is wide.
    """

    def __init__(self, q: torch.Tensor, k: torch.Tensor, weights: torch.Tensor, learns: bool) -> None:
        self.q, self.k = q.flatten(0, 1), k.flatten(0, 1)
        self.wide = torch.promote_types(q.dtype, torch.float32)
        self.weights = weights.flatten(0, 1).to(self.wide)
        if learns:
            self.grad_q, self.grad_weights = torch.zeros_like(self.q), torch.zeros_like(self.weights)
            self.grad_k = torch.zeros_like(self.k, dtype=self.wide)

    def dots(self, now: _Slice) -> torch.Tensor:
        """The products that the weights sum up, [g, I, S] wide: rounded to the dtype of q, negative ones 0."""
        q, keys = self.q[now.queries], _take(self.k, now.places)  # [g, I, J], [b, S, J]
        dots = torch.bmm(q.view(len(keys), -1, q.shape[-1]), keys.transpose(1, 2)).to(self.wide)
        return dots.view(*q.shape[:2], -1).relu_()

    def scores(self, now: _Slice, dots: torch.Tensor) -> torch.Tensor:
        """Index scores, [g, S] wide."""
        return torch.bmm(self.weights[now.queries, None], dots).squeeze(1)

    def learn(self, now: _Slice, dots: torch.Tensor, grad_scores: torch.Tensor) -> None:
        """Take in the gradient of a slice's scores, [g, S]."""
        q, keys = self.q[now.queries], _take(self.k, now.places)
        b, S = keys.shape[:2]
        self.grad_weights[now.queries] = torch.bmm(dots, grad_scores[..., None]).squeeze(-1)
        grad_dots = (self.weights[now.queries, :, None] * grad_scores[:, None]).mul_(dots > 0)
        grad_dots = grad_dots.to(q.dtype).view(b, -1, S)  # [b, g * I / b, S]
        self.grad_q[now.queries] = torch.bmm(grad_dots, keys).view(q.shape)
        grad_keys = torch.bmm(grad_dots.transpose(1, 2), q.view(b, -1, q.shape[-1]))  # [b, S, J]
        self.grad_k.index_add_(0, now.places.flatten(), grad_keys.flatten(0, 1).to(self.wide))


class _IndexerKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, index_q, index_k, index_weights, q, entries, log_sum_exp, query_weights, scale, learns):
        teacher = _Teacher(q, entries, log_sum_exp, scale)
        student = _Student(index_q, index_k, index_weights, learns)
        factors = query_weights.flatten().to(teacher.wide)
        kl, uniform_kl = torch.zeros_like(factors), torch.zeros_like(factors)
        heads, width = max(q.shape[2], index_q.shape[2]), max(q.shape[3], index_q.shape[3])
        for now in _slices(entries, heads, width):
            log_p, p = _distribution(teacher.log_mass(now), now.hidden)
            dots = student.dots(now)
            log_r, r = _distribution(student.scores(now, dots), now.hidden)
            num_seen = (~now.hidden).sum(dim=-1).clamp(min=1)
            kl[now.queries] = (p * (log_p - log_r)).sum(dim=-1)
            uniform_kl[now.queries] = (p * log_p).sum(dim=-1) + num_seen.to(p.dtype).log()
            if learns:
                student.learn(now, dots, r.sub_(p).mul_(factors[now.queries, None]))
        ctx.dtypes = index_k.dtype, index_weights.dtype
        ctx.shapes = index_q.shape, index_k.shape, index_weights.shape
        if learns:
            ctx.save_for_backward(student.grad_q, student.grad_k, student.grad_weights)
        loss, kl, uniform_kl = torch.dot(factors, kl), kl.view(q.shape[:2]), uniform_kl.view(q.shape[:2])
        ctx.mark_non_differentiable(kl, uniform_kl)
        return loss, kl, uniform_kl

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        grad_q, grad_k, grad_weights = ctx.saved_tensors
        of_k, of_weights = ctx.dtypes
        grads = grad_q * grad.to(grad_q.dtype), (grad_k * grad).to(of_k), (grad_weights * grad).to(of_weights)
        return *(g.view(shape) for g, shape in zip(grads, ctx.shapes, strict=True)), *([None] * 6)


def recall(
    q: torch.Tensor, entries: Entries, log_sum_exp: torch.Tensor, picked: torch.Tensor, scale: float
) -> torch.Tensor:
    """See ``dsv4.ops.indexer_kl.recall``."""
    teacher, num_picks = _Teacher(q, entries, log_sum_exp, scale), picked.shape[-1]
    row = torch.arange(len(q), device=q.device)[:, None, None] * entries.values.shape[1]
    places = torch.where(picked < 0, -1, picked + row).flatten(0, 1)  # [B * T, P]
    shares = q.new_full(picked.shape[:2], torch.nan, dtype=teacher.wide).flatten()
    for now in _slices(entries, q.shape[2], q.shape[3]):
        chooses = (~now.hidden).sum(dim=-1) > num_picks  # [g]
        if bool(chooses.any()):
            mass = teacher.log_mass(now).masked_fill_(now.hidden, -torch.inf)[chooses]  # [n, S]
            best = now.places[0][mass.topk(num_picks, dim=-1).indices]  # [n, P]
            is_held = _contains(places[now.queries][chooses], best)
            shares[now.queries][chooses] = is_held.to(mass.dtype).mean(dim=-1)
    return shares.view(picked.shape[:2])


def _contains(some: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Whether a row of ``some`` [n, P] holds each of the same row of ``wanted`` [n, P]."""
    some = some.sort(dim=-1).values
    at = torch.searchsorted(some, wanted).clamp(max=some.shape[-1] - 1)
    return some.gather(-1, at) == wanted


def _take(rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """rows: [B * C, K]; places: [b, S]; returns [b, S, K]."""
    return rows.index_select(0, places.flatten()).view(*places.shape, -1)


def _distribution(logits: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and probabilities over what is not hidden, both 0 where it is. Overwrites logits [g, S]."""
    log_p = logits.masked_fill_(hidden, -torch.inf).log_softmax(dim=-1)  # not a number where all is hidden
    return log_p.masked_fill(hidden, 0), log_p.exp().masked_fill_(hidden, 0)
