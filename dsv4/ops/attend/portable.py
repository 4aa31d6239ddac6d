"""Attention in blocks of queries, scores recomputed in backward.

A block of queries meets its window as one matrix product: the windows of neighbouring queries overlap, so a
block of ``size`` queries needs ``window - 1 + size`` raw tokens. Picked entries are gathered query by query;
entries given by an interval are shared by the row and need no gathering. Only the log-sum-exp is kept for
backward, beside the inputs. Sums run in a fixed order, so two runs give the same bits.

Scores are held in base 2 (times log2 e), since exp2 costs a third of exp.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from dsv4.ops.attend import Entries

BLOCK = 32  # queries whose windows are read together
SCORES_HELD = 1 << 20  # scores of one group of blocks, elements
GATHERED_HELD = 1 << 21  # channels of picked entries gathered for one group, elements
LOG2_E = math.log2(math.e)


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
    if entries is None:
        values, picked, begin, end = kv.new_empty(kv.shape[0], 0, kv.shape[2]), None, raw_begin, raw_begin
    else:
        values, picked, begin, end = entries
    return _Attend.apply(q, kv, sink, raw_begin, values, picked, begin, end, window, scale)


class _Part(NamedTuple):
    """Something a group attends to: its window's raw tokens, or its entries.

    values: [b, S, K], with b = n for raw tokens, B for entries shared by a row, n * s for gathered ones;
    scores: [n, s, H, S] wide, base 2, -inf where hidden.
    """

    values: torch.Tensor
    scores: torch.Tensor


class _Group(NamedTuple):
    """A few consecutive blocks of all rows: n = B * blocks of them, s = queries a block.

    q: [n, s * H, K]; parts: the raw tokens, then the entries if there are any.
    """

    queries: slice
    blocks: slice
    q: torch.Tensor
    parts: list[_Part]


class _Layout:
    """How queries fall into blocks and blocks into groups, and where a block's raw tokens lie."""

    def __init__(
        self,
        q: torch.Tensor,
        kv: torch.Tensor,
        raw_begin: torch.Tensor,
        values: torch.Tensor,
        picked: torch.Tensor | None,
        begin: torch.Tensor,
        end: torch.Tensor,
        window: int,
        scale: float,
    ) -> None:
        self.B, self.T, self.H, self.K = q.shape
        self.q, self.picked, self.begin, self.end = q, picked, begin, end
        self.raw_begin = raw_begin.clamp(min=0)
        self.scale, self.wide = scale, torch.promote_types(q.dtype, torch.float32)
        num_entries = values.shape[1] if picked is None else picked.shape[2]
        self.size = max(1, min(BLOCK, self.T))
        while self.size > 8 and self.B * self.size * self.H * num_entries > SCORES_HELD:
            self.size //= 2
        self.before = -(-(window - 1) // self.size)  # blocks of raw tokens a block reads before its own
        self.width = self.size * (self.before + 1)  # L
        self.num_blocks = -(-self.T // self.size)
        self.step = max(1, SCORES_HELD // (self.B * self.size * self.H * (self.width + num_entries)))
        if picked is not None:
            self.step = max(1, min(self.step, GATHERED_HELD // (self.B * self.size * num_entries * self.K)))
        # Block j reads raw[:, j * size : j * size + L]; ``front`` rows were put before kv, or left off it.
        self.front = self.before * self.size - (kv.shape[1] - self.T)
        self.raw = F.pad(kv, (0, 0, self.front, self.num_blocks * self.size - self.T))
        self.column = torch.arange(self.width, device=q.device)
        own = self.before * self.size + torch.arange(self.size, device=q.device)[:, None]
        self.is_outside = (self.column > own) | (self.column <= own - window)  # [s, L]
        self.values = values

    def groups(self) -> Iterator[_Group]:
        """Yield every group, its scores scaled and masked."""
        for first in range(0, self.num_blocks, self.step):
            blocks = slice(first, min(first + self.step, self.num_blocks))
            queries = slice(first * self.size, min(blocks.stop * self.size, self.T))
            q = self.fold(self.q, queries, blocks).flatten(1, 2)  # [n, s * H, K]
            scaled_q = q.to(self.wide) * (self.scale * LOG2_E)
            raw = self.raw.unfold(1, self.width, self.size)[:, blocks]  # [B, blocks, K, L]
            raw = raw.transpose(2, 3).reshape(-1, self.width, self.K)  # [n, L, K]
            raw_scores = torch.bmm(scaled_q, raw.to(self.wide).transpose(1, 2))
            raw_scores = raw_scores.view(-1, self.size, self.H, self.width)
            parts = [_Part(raw, raw_scores.add_(self._bias(self._raw_hidden(queries, blocks))))]
            if self.picked is not None:
                parts.append(self._picked(scaled_q, self.picked, queries, blocks))
            elif self.values.shape[1]:
                parts.append(self._interval(scaled_q, queries, blocks))
            yield _Group(queries, blocks, q, parts)

    def fold(self, x: torch.Tensor, queries: slice, blocks: slice, fill: int = 0) -> torch.Tensor:
        """[B, T, ...] restricted to a group, as [n, s, ...]; queries past the last are ``fill``."""
        x = x[:, queries]
        missing = (blocks.stop - blocks.start) * self.size - x.shape[1]
        if missing:
            x = torch.cat([x, x.new_full((x.shape[0], missing, *x.shape[2:]), fill)], dim=1)
        return x.reshape(-1, self.size, *x.shape[2:])

    def unfold(self, x: torch.Tensor, queries: slice) -> torch.Tensor:
        """[n, s, ...] back to [B, queries, ...]."""
        return x.reshape(self.B, -1, *x.shape[2:])[:, : queries.stop - queries.start]

    def add_raw_(self, grad_raw: torch.Tensor, grad_window: torch.Tensor, group: _Group) -> None:
        """Add the gradient of each block's raw tokens, [n, L, K], where they lie in grad_raw."""
        lying = grad_raw.unflatten(1, (-1, self.size))  # [B, blocks, s, K], a view
        grad_window = grad_window.view(self.B, -1, self.before + 1, self.size, self.K)
        for shift in range(self.before + 1):
            lying[:, group.blocks.start + shift : group.blocks.stop + shift] += grad_window[:, :, shift]

    def add_entries_(self, grad_values: torch.Tensor, grad_entries: torch.Tensor, group: _Group) -> None:
        """Add the gradient of a group's entries into grad_values [B, C, K], in a fixed order."""
        if self.picked is None:
            grad_values[:, : grad_entries.shape[1]] += grad_entries
        else:
            rows = self._rows(self.fold(self.picked, group.queries, group.blocks, fill=-1)).flatten()
            flat = grad_entries.view(-1, self.K).to(grad_values.dtype)
            grad_values.view(-1, self.K).index_add_(0, rows, flat)

    def raw_gradient(self, grad_raw: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """The gradient of kv from that of ``raw``: [B, S, K]."""
        if self.front < 0:
            return F.pad(grad_raw[:, : num_tokens + self.front], (0, 0, -self.front, 0))
        return grad_raw[:, self.front : self.front + num_tokens]

    def _raw_hidden(self, queries: slice, blocks: slice) -> torch.Tensor:
        """Which raw tokens a query must not see: [n, s, L]."""
        start = torch.arange(blocks.start, blocks.stop, device=self.column.device) * self.size - self.front
        start = start.repeat(self.B)[:, None]  # [n, 1]: the block's first raw token, as an index of kv
        begin = self.fold(self.raw_begin, queries, blocks) - start  # [n, s]
        return self.is_outside | (self.column < begin[..., None])

    def _picked(self, scaled_q: torch.Tensor, picked: torch.Tensor, queries: slice, blocks: slice) -> _Part:
        picked = self.fold(picked, queries, blocks, fill=-1)  # [n, s, P]
        entries = self.values.flatten(0, 1).index_select(0, self._rows(picked).flatten())
        entries = entries.view(-1, picked.shape[-1], self.K)  # [n * s, P, K]
        scores = torch.bmm(scaled_q.view(-1, self.H, self.K), entries.to(self.wide).transpose(1, 2))
        return _Part(entries, scores.view(-1, self.size, self.H, picked.shape[-1]).add_(self._bias(picked < 0)))

    def _rows(self, picked: torch.Tensor) -> torch.Tensor:
        """Picked entries [n, s, P] as rows of all B * C; a missing pick reads its row's first."""
        row = torch.arange(self.B, device=picked.device).repeat_interleave(len(picked) // self.B)
        return picked.clamp(min=0) + row[:, None, None] * self.values.shape[1]

    def _interval(self, scaled_q: torch.Tensor, queries: slice, blocks: slice) -> _Part:
        num_seen = max(1, min(int(self.end[:, queries].max()), self.values.shape[1]))
        entries = self.values[:, :num_seen]  # [B, C', K]
        scores = torch.bmm(scaled_q.view(self.B, -1, self.K), entries.to(self.wide).transpose(1, 2))
        entry = torch.arange(num_seen, device=entries.device)
        begin, end = (self.fold(x, queries, blocks)[..., None] for x in (self.begin, self.end))
        hidden = (entry < begin) | (entry >= end)  # [n, s, C']
        return _Part(entries, scores.view(-1, self.size, self.H, num_seen).add_(self._bias(hidden)))

    def _bias(self, hidden: torch.Tensor) -> torch.Tensor:
        """-inf where hidden [n, s, S], as [n, s, 1, S]: adding it is far cheaper than filling through a mask."""
        zero = torch.zeros((), dtype=self.wide, device=hidden.device)
        return torch.where(hidden, -torch.inf, zero)[:, :, None]


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, kv, sink, raw_begin, values, picked, begin, end, window, scale):
        layout = _Layout(q, kv, raw_begin, values, picked, begin, end, window, scale)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        log_total = q.new_empty(q.shape[:3], dtype=layout.wide)  # [B, T, H], base 2
        log_sink = sink.to(layout.wide) * LOG2_E
        for group in layout.groups():
            peak = log_sink  # [n, s, H] from the first part on
            for part in group.parts:
                peak = torch.maximum(part.scores.amax(dim=-1), peak)
            weights = [part.scores.sub_(peak[..., None]).exp2_() for part in group.parts]
            total = _sum([(log_sink - peak).exp2_(), *(p.sum(dim=-1) for p in weights)])
            mixed = _sum([_mix(p, part.values) for part, p in zip(group.parts, weights, strict=True)])
            out[:, group.queries] = layout.unfold(mixed.div_(total[..., None]), group.queries)
            log_total[:, group.queries] = layout.unfold(peak + total.log2(), group.queries)
        ctx.save_for_backward(q, kv, sink, raw_begin, values, picked, begin, end, log_total)
        ctx.window, ctx.scale = window, scale
        log_sum_exp = log_total / LOG2_E
        ctx.mark_non_differentiable(log_sum_exp)
        return out, log_sum_exp

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, _):
        q, kv, sink, raw_begin, values, picked, begin, end, log_total = ctx.saved_tensors
        layout = _Layout(q, kv, raw_begin, values, picked, begin, end, ctx.window, ctx.scale)
        grad_q = torch.empty_like(q, memory_format=torch.contiguous_format)
        grad_raw, grad_values = (torch.zeros_like(x, dtype=layout.wide) for x in (layout.raw, values))
        grad_sink = torch.zeros_like(sink, dtype=layout.wide)
        log_sink = sink.to(layout.wide) * LOG2_E
        for group in layout.groups():
            grad = layout.fold(grad_out, group.queries, group.blocks).flatten(1, 2)  # [n, s * H, K]
            log_now = layout.fold(log_total, group.queries, group.blocks)  # [n, s, H]
            # d score = p (d p - delta), where delta = sum p d p over everything in the softmax.
            weights = [part.scores.sub_(log_now[..., None]).exp2_() for part in group.parts]
            moved = [_project(grad, part.values, p).mul_(p) for part, p in zip(group.parts, weights, strict=True)]
            delta = _sum([p_dp.sum(dim=-1) for p_dp in moved])  # [n, s, H]
            grad_sink -= ((log_sink - log_now).exp2_() * delta).flatten(0, 1).sum(dim=0)

            scaled_q = (group.q * layout.scale).to(q.dtype)
            grad_scores = [p_dp.addcmul_(p, delta[..., None], value=-1) for p, p_dp in zip(weights, moved, strict=True)]
            mixed = _sum([_mix(ds, part.values) for part, ds in zip(group.parts, grad_scores, strict=True)])
            grad_q[:, group.queries] = layout.unfold(mixed.mul_(layout.scale), group.queries)
            adders = ((layout.add_raw_, grad_raw), (layout.add_entries_, grad_values))[: len(group.parts)]
            for (add_, gradient), part, p, ds in zip(adders, group.parts, weights, grad_scores, strict=True):
                add_(gradient, _key_value_gradient(ds, p, scaled_q, grad, part.values), group)
        grad_kv = layout.raw_gradient(grad_raw, kv.shape[1]).to(kv.dtype)
        return grad_q, grad_kv, grad_sink.to(sink.dtype), None, grad_values.to(values.dtype), *([None] * 5)


def _sum(terms: list[torch.Tensor]) -> torch.Tensor:
    """Add the terms in order, overwriting the first."""
    total = terms[0]
    for term in terms[1:]:
        total += term
    return total


def _mix(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Weighted sums: weights [n, s, H, S], values [b, S, K] with b = n, B or n * s; returns [n, s, H, K] wide."""
    n, s, H, S = weights.shape
    flat = weights.view(values.shape[0], -1, S).to(values.dtype)
    return torch.bmm(flat, values).view(n, s, H, -1).to(weights.dtype)


def _project(grad: torch.Tensor, values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Products of output gradients [n, s * H, K] with values [b, S, K]; returns the shape and dtype of like."""
    rows = grad.reshape(values.shape[0], -1, grad.shape[-1]).to(values.dtype)
    return torch.bmm(rows, values.transpose(1, 2)).view(like.shape).to(like.dtype)


def _key_value_gradient(
    grad_scores: torch.Tensor,
    weights: torch.Tensor,
    scaled_q: torch.Tensor,
    grad: torch.Tensor,
    values: torch.Tensor,
) -> torch.Tensor:
    """The gradient of shared keys and values, as keys through the scores and as values through the output.

    grad_scores, weights: [n, s, H, S]; scaled_q, grad: [n, s * H, K]; values: [b, S, K]; returns [b, S, K].
    """
    batch, S, K = values.shape
    through = _stack(values, *(x.view(batch, -1, S) for x in (grad_scores, weights)))
    source = _stack(values, *(x.reshape(batch, -1, K) for x in (scaled_q, grad)))
    return torch.bmm(through.transpose(1, 2), source)


def _stack(like: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Concatenate two [b, r, x] along r, cast to the dtype of like on the way."""
    rows = first.shape[1]
    stacked = like.new_empty(first.shape[0], 2 * rows, first.shape[2])
    stacked[:, :rows], stacked[:, rows:] = first, second
    return stacked
