"""Attention in blocks of queries, scores recomputed in backward.

A block of queries meets its window as one matrix product: the windows of neighbouring queries overlap, so a
block of ``size`` queries needs ``window - 1 + size`` raw tokens. Picked entries are gathered query by query;
entries given by an interval are shared by the row and need no gathering. Only the output and its
log-sum-exp are kept for backward. Sums run in a fixed order, so two runs give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from dsv4.ops.attend import Entries

BLOCK = 64  # queries whose windows are read together
SCORES_HELD = 1 << 20  # scores of one group of blocks, elements
GATHERED_HELD = 1 << 22  # channels of picked entries gathered for one group, elements


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
    values, picked, begin, end = entries if entries is not None else (None, None, None, None)
    return _Attend.apply(q, kv, sink, raw_begin, values, picked, begin, end, window, scale)


class _Group(NamedTuple):
    """A few consecutive blocks, their queries flattened: n = B * blocks, s = queries a block."""

    queries: slice  # of the T queries
    blocks: slice
    q: torch.Tensor  # [n, s * H, K]
    raw: torch.Tensor  # [n, L, K] the raw tokens of each block
    raw_scores: torch.Tensor  # [n, s, H, L] wide
    near: torch.Tensor | None  # entries: [B, C', K] shared by the row, or [n * s, P, K] gathered
    near_scores: torch.Tensor | None  # [n, s, H, C' or P] wide


class _Layout:
    """How queries fall into blocks, blocks into groups, and where a block's raw tokens lie."""

    def __init__(self, q, kv, raw_begin, values, picked, begin, end, window, scale):
        self.B, self.T, self.H, self.K = q.shape
        self.q, self.values, self.picked, self.begin, self.end = q, values, picked, begin, end
        self.scale = scale
        self.wide = torch.promote_types(q.dtype, torch.float32)
        num_near = 0 if values is None else values.shape[1] if picked is None else picked.shape[2]
        size = min(BLOCK, self.T)
        while size > 8 and self.B * size * self.H * num_near > SCORES_HELD:
            size //= 2
        self.size = size
        self.before = -(-(window - 1) // size)  # blocks of raw tokens a block reads before its own
        self.width = size * (self.before + 1)  # L
        self.num_blocks = -(-self.T // size)
        self.history = kv.shape[1] - self.T
        # Lay the raw tokens out so that block j reads [j * size, j * size + L).
        self.front = self.before * size - self.history  # zeros put before (or tokens left off)
        back = self.num_blocks * size - self.T
        self.raw = torch.nn.functional.pad(kv, (0, 0, self.front, back))  # [B, (num_blocks + before) * size, K]
        column, query = torch.arange(self.width, device=q.device), torch.arange(size, device=q.device)[:, None]
        own = self.before * size + query
        self.is_outside = (column > own) | (column <= own - window)  # [s, L]
        self.column = column
        self.raw_begin = raw_begin.clamp(min=0)
        per_block = self.B * size * self.H * (self.width + num_near)
        self.step = max(1, SCORES_HELD // per_block)
        if picked is not None:
            self.step = max(1, min(self.step, GATHERED_HELD // (self.B * size * num_near * self.K)))

    def groups(self) -> Iterator[_Group]:
        """Yield every group with its scaled and masked scores."""
        for first in range(0, self.num_blocks, self.step):
            last = min(first + self.step, self.num_blocks)
            queries = slice(first * self.size, min(last * self.size, self.T))
            blocks = slice(first, last)
            q = self.fold(self.q, queries, blocks).flatten(1, 2)  # [n, s * H, K]
            wide_q = q.to(self.wide) * self.scale
            raw = self.raw.unfold(1, self.width, self.size)[:, blocks]  # [B, blocks, K, L]
            raw = raw.transpose(2, 3).reshape(-1, self.width, self.K)  # [n, L, K]
            raw_scores = torch.bmm(wide_q, raw.to(self.wide).transpose(1, 2))
            raw_scores = raw_scores.view(-1, self.size, self.H, self.width)
            raw_scores.masked_fill_(self._raw_hidden(queries, blocks)[:, :, None], -torch.inf)
            near, near_scores = self._near(wide_q, queries, blocks)
            yield _Group(queries, blocks, q, raw, raw_scores, near, near_scores)

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

    def _raw_hidden(self, queries: slice, blocks: slice) -> torch.Tensor:
        """Which raw tokens a query must not see: [n, s, L]."""
        start = torch.arange(blocks.start, blocks.stop, device=self.column.device) * self.size - self.front
        start = start.repeat(self.B)[:, None]  # [n, 1]: the block's first raw token, as an index of kv
        begin = self.fold(self.raw_begin, queries, blocks) - start  # [n, s]
        return self.is_outside | (self.column < begin[..., None])

    def _near(
        self, wide_q: torch.Tensor, queries: slice, blocks: slice
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if self.values is None:
            return None, None
        if self.picked is not None:
            picked = self.fold(self.picked, queries, blocks, fill=-1)  # [n, s, P]
            near = self.values.flatten(0, 1).index_select(0, self.rows(picked).flatten())
            near = near.view(-1, picked.shape[-1], self.K)  # [n * s, P, K]
            heads = wide_q.view(-1, self.H, self.K)  # [n * s, H, K]
            scores = torch.bmm(heads, near.to(self.wide).transpose(1, 2)).view(-1, self.size, self.H, near.shape[1])
            hidden = picked < 0  # [n, s, P]
        else:
            num_seen = max(1, min(int(self.end[:, queries].max()), self.values.shape[1]))
            near = self.values[:, :num_seen]  # [B, C', K]
            heads = wide_q.view(self.B, -1, self.K)
            scores = torch.bmm(heads, near.to(self.wide).transpose(1, 2)).view(-1, self.size, self.H, num_seen)
            entry = torch.arange(num_seen, device=near.device)
            begin, end = (self.fold(x, queries, blocks)[..., None] for x in (self.begin, self.end))
            hidden = (entry < begin) | (entry >= end)  # [n, s, C']
        return near, scores.masked_fill_(hidden[:, :, None], -torch.inf)

    def rows(self, picked: torch.Tensor) -> torch.Tensor:
        """Indices of picked entries among the entries of all rows; a missing pick reads the row's first."""
        row = torch.arange(self.B, device=picked.device).repeat_interleave(len(picked) // self.B)
        return picked.clamp(min=0) + row[:, None, None] * self.values.shape[1]


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, kv, sink, raw_begin, values, picked, begin, end, window, scale):
        layout = _Layout(q, kv, raw_begin, values, picked, begin, end, window, scale)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        log_total = q.new_empty(q.shape[:3], dtype=layout.wide)
        sink_wide = sink.to(layout.wide)
        for group in layout.groups():
            n, s, H, _ = group.raw_scores.shape
            peak = torch.maximum(group.raw_scores.amax(dim=-1), sink_wide)  # [n, s, H]
            if group.near_scores is not None:
                peak = torch.maximum(peak, group.near_scores.amax(dim=-1))
            weights = group.raw_scores.sub_(peak[..., None]).exp_()
            total = weights.sum(dim=-1) + (sink_wide - peak).exp()
            mixed = torch.bmm(weights.view(n, s * H, -1).to(q.dtype), group.raw).view(n, s, H, -1)
            if group.near_scores is not None:
                weights = group.near_scores.sub_(peak[..., None]).exp_()
                total += weights.sum(dim=-1)
                mixed = mixed + _mix(weights.to(q.dtype), group.near)
            out[:, group.queries] = layout.unfold(mixed / total[..., None], group.queries)
            log_total[:, group.queries] = layout.unfold(peak + total.log(), group.queries)
        ctx.save_for_backward(q, kv, sink, raw_begin, values, picked, begin, end, out, log_total)
        ctx.window, ctx.scale = window, scale
        ctx.mark_non_differentiable(log_total)
        return out, log_total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, _):
        q, kv, sink, raw_begin, values, picked, begin, end, out, log_total = ctx.saved_tensors
        layout = _Layout(q, kv, raw_begin, values, picked, begin, end, ctx.window, ctx.scale)
        wide, size = layout.wide, layout.size
        # d score = p (d p - delta) with delta = sum_k out d out, the sink's share included.
        delta = (grad_out.to(wide) * out).sum(dim=-1)  # [B, T, H]
        grad_sink = -((sink.to(wide) - log_total).exp() * delta).flatten(0, 1).sum(dim=0)
        grad_q = torch.empty_like(q, memory_format=torch.contiguous_format)
        grad_raw = torch.zeros_like(layout.raw, dtype=wide).unflatten(1, (-1, size))  # [B, blocks, s, K]
        grad_values = None if values is None else torch.zeros_like(values, dtype=wide)
        for group in layout.groups():
            n, s, H, _ = group.raw_scores.shape
            scaled_q = (group.q * layout.scale).to(q.dtype)
            grad = layout.fold(grad_out, group.queries, group.blocks).flatten(1, 2)  # [n, s * H, K]
            delta_now = layout.fold(delta, group.queries, group.blocks)[..., None]  # [n, s, H, 1]
            log_now = layout.fold(log_total, group.queries, group.blocks)[..., None]

            weights = group.raw_scores.sub_(log_now).exp_()
            grad_scores = torch.bmm(grad, group.raw.transpose(1, 2)).view(weights.shape)
            grad_scores = (grad_scores - delta_now).mul_(weights).to(q.dtype).view(n, s * H, -1)
            grad_mixed = torch.bmm(grad_scores, group.raw).view(n, s, H, -1)
            grad_window = torch.bmm(grad_scores.transpose(1, 2), scaled_q)
            grad_window = torch.baddbmm(grad_window, weights.view(n, s * H, -1).to(q.dtype).transpose(1, 2), grad)
            grad_window = grad_window.view(layout.B, -1, layout.before + 1, size, layout.K)
            for shift in range(layout.before + 1):
                grad_raw[:, group.blocks.start + shift : group.blocks.stop + shift] += grad_window[:, :, shift]

            if group.near_scores is not None:
                weights = group.near_scores.sub_(log_now).exp_()
                near_q = _against(grad, group.near, n, s)  # [n, s, H, C' or P]
                grad_scores = (near_q - delta_now).mul_(weights).to(q.dtype)
                grad_mixed = grad_mixed + _mix(grad_scores, group.near)
                _add_near_grad(layout, group, grad_values, grad_scores, weights.to(q.dtype), scaled_q, grad)
            grad_q[:, group.queries] = layout.unfold(grad_mixed * layout.scale, group.queries)
        kept = slice(max(layout.front, 0), max(layout.front, 0) + min(kv.shape[1], kv.shape[1] + layout.front))
        grad_kv = grad_raw.flatten(1, 2)[:, kept]
        if layout.front < 0:
            grad_kv = torch.nn.functional.pad(grad_kv, (0, 0, -layout.front, 0))
        grad_values = None if values is None else grad_values.to(values.dtype)
        return grad_q, grad_kv.to(kv.dtype), grad_sink.to(sink.dtype), None, grad_values, *([None] * 5)


def _mix(weights: torch.Tensor, near: torch.Tensor) -> torch.Tensor:
    """Weighted sums of entries: weights [n, s, H, C' or P] with shared or gathered entries -> [n, s, H, K]."""
    n, s, H, width = weights.shape
    batch = near.shape[0]
    return torch.bmm(weights.view(batch, -1, width), near).view(n, s, H, -1)


def _against(grad: torch.Tensor, near: torch.Tensor, n: int, s: int) -> torch.Tensor:
    """Products of output gradients [n, s * H, K] with entries -> [n, s, H, C' or P]."""
    rows = grad.reshape(near.shape[0], -1, grad.shape[-1])
    return torch.bmm(rows, near.transpose(1, 2)).view(n, s, -1, near.shape[1])


def _add_near_grad(
    layout: _Layout,
    group: _Group,
    grad_values: torch.Tensor,
    grad_scores: torch.Tensor,
    weights: torch.Tensor,
    scaled_q: torch.Tensor,
    grad: torch.Tensor,
) -> None:
    """Add a group's gradient of the entries: as keys through the scores, as values through the output."""
    assert group.near is not None
    batch, width, K = group.near.shape
    through = torch.cat([grad_scores.view(batch, -1, width), weights.view(batch, -1, width)], dim=1)
    source = torch.cat([scaled_q.reshape(batch, -1, K), grad.reshape(batch, -1, K)], dim=1)
    grad_near = torch.bmm(through.transpose(1, 2), source)  # [batch, C' or P, K]
    if layout.picked is None:
        grad_values[:, :width] += grad_near
        return
    picked = layout.fold(layout.picked, group.queries, group.blocks, fill=-1)
    rows = layout.rows(picked).flatten()
    grad_values.view(-1, K).index_add_(0, rows, grad_near.view(-1, K).to(grad_values.dtype))
