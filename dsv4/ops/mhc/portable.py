"""Hyper-connections with the coefficients of many tokens side by side, and their own backward.

Coefficients are held token-last, [N, N, T]: sums over rows and columns are then sums of long vectors.
Backward recomputes the Sinkhorn rounds and keeps, besides the streams, only the M mixes of a token.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

TOKENS_AT_ONCE = 512  # a slice of streams that stays in a core's cache


def pre(
    streams: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    norm_eps: float,
    eps: float,
    iterations: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See ``dsv4.ops.mhc.pre``."""
    B, T, N, D = streams.shape
    u, post_weights, comb = _Pre.apply(streams.view(B * T, N, D), fn, base, scale, norm_eps, eps, iterations)
    return u.view(B, T, D), post_weights.view(B, T, N), comb.view(B, T, N, N)


def post(streams: torch.Tensor, y: torch.Tensor, post_weights: torch.Tensor, comb: torch.Tensor) -> torch.Tensor:
    """See ``dsv4.ops.mhc.post``."""
    mixed = _Post.apply(streams.flatten(0, 1), y.flatten(0, 1), post_weights.flatten(0, 1), comb.flatten(0, 1))
    return mixed.view(streams.shape)


def head(
    streams: torch.Tensor, fn: torch.Tensor, base: torch.Tensor, scale: torch.Tensor, norm_eps: float, eps: float
) -> torch.Tensor:
    """See ``dsv4.ops.mhc.head``."""
    B, T, N, D = streams.shape
    u, _, _ = _Pre.apply(streams.view(B * T, N, D), fn, base, scale, norm_eps, eps, 0)
    return u.view(B, T, D)


def sinkhorn(logits: torch.Tensor, eps: float, iterations: int) -> torch.Tensor:
    """See ``dsv4.ops.mhc.sinkhorn``."""
    N = logits.shape[-1]
    token_last = logits.reshape(-1, N, N).permute(1, 2, 0)  # [N, N, T]
    return _Sinkhorn.apply(token_last, eps, iterations).permute(2, 0, 1).reshape(logits.shape)


def _sinkhorn_rounds(logits: torch.Tensor, eps: float, iterations: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return every intermediate matrix [N, N, T], first the bare softmax, and the result."""
    softmax = logits.softmax(dim=1)
    kept = [softmax]
    comb = softmax + eps
    for half_round in range(2 * iterations - 1):
        kept.append(comb)
        comb = comb / (comb.sum(dim=half_round % 2, keepdim=True) + eps)
    return kept, comb


def _sinkhorn_backward(grad: torch.Tensor, kept: list[torch.Tensor], eps: float) -> torch.Tensor:
    """Gradient of the logits from that of the result."""
    for half_round in range(len(kept) - 2, -1, -1):
        before, axis = kept[half_round + 1], half_round % 2
        total = before.sum(dim=axis, keepdim=True) + eps
        grad = (grad - (grad * before).sum(dim=axis, keepdim=True) / total) / total
    softmax = kept[0]
    return softmax * (grad - (grad * softmax).sum(dim=1, keepdim=True))


class _Sinkhorn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, eps, iterations):
        ctx.save_for_backward(logits)
        ctx.eps, ctx.iterations = eps, iterations
        return _sinkhorn_rounds(logits, eps, iterations)[1]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (logits,) = ctx.saved_tensors
        kept, _ = _sinkhorn_rounds(logits, ctx.eps, ctx.iterations)
        return _sinkhorn_backward(grad, kept, ctx.eps), None, None


def _logits(mixes: torch.Tensor, base: torch.Tensor, scale: torch.Tensor, N: int) -> torch.Tensor:
    """Affine map of the mixes, token-last: [M, T]. At the head M = N and the scale is one number."""
    per_row = scale if scale.numel() == 1 else scale.repeat_interleave(scale.new_tensor([N, N, N * N]).long())
    return torch.addcmul(base[:, None], per_row[:, None], mixes.T)


class _Pre(torch.autograd.Function):
    @staticmethod
    def forward(ctx, streams, fn, base, scale, norm_eps, eps, iterations):
        T, N, D = streams.shape
        M = fn.shape[0]
        mixes, inverse_rms = fn.new_empty(T, M), fn.new_empty(T, 1)
        for t in range(0, T, TOKENS_AT_ONCE):
            flat = streams[t : t + TOKENS_AT_ONCE].flatten(1).to(fn.dtype)  # [t, N * D]
            norm = torch.linalg.vector_norm(flat, dim=-1, keepdim=True)
            inverse_rms[t : t + TOKENS_AT_ONCE] = torch.rsqrt(norm.square() / (N * D) + norm_eps)
            mixes[t : t + TOKENS_AT_ONCE] = flat @ fn.T
        mixes.mul_(inverse_rms)
        logits = _logits(mixes, base, scale, N)  # [M, T]
        pre_weights = torch.sigmoid(logits[:N]).add_(eps).T.contiguous()  # [T, N]
        u = streams.new_empty(T, D)
        for t in range(0, T, TOKENS_AT_ONCE):
            now = slice(t, t + TOKENS_AT_ONCE)
            u[now] = torch.bmm(pre_weights[now, None], streams[now].to(fn.dtype))[:, 0]
        post_weights = (2 * torch.sigmoid(logits[N : 2 * N])).T.contiguous()  # [T, N], empty at the head
        comb = fn.new_empty(0)
        if iterations:
            comb = _sinkhorn_rounds(logits[2 * N :].view(N, N, T), eps, iterations)[1]
            comb = comb.permute(2, 0, 1).contiguous()  # [T, N, N]
        ctx.save_for_backward(streams, fn, base, scale, mixes, inverse_rms)
        ctx.eps, ctx.iterations = eps, iterations
        return u, post_weights, comb

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_u, grad_post, grad_comb):
        streams, fn, base, scale, mixes, inverse_rms = ctx.saved_tensors
        T, N, D = streams.shape
        logits = _logits(mixes, base, scale, N)
        gate = torch.sigmoid(logits[:N])  # [N, T]
        pre_weights = gate.T + ctx.eps  # [T, N]
        grad_pre = fn.new_empty(T, N)
        for t in range(0, T, TOKENS_AT_ONCE):
            now = slice(t, t + TOKENS_AT_ONCE)
            grad_pre[now] = torch.bmm(streams[now].to(fn.dtype), grad_u[now, :, None].to(fn.dtype))[..., 0]
        grad_logits = torch.empty_like(logits)
        grad_logits[:N] = grad_pre.T * gate * (1 - gate)
        if ctx.iterations:
            gate = torch.sigmoid(logits[N : 2 * N])
            grad_logits[N : 2 * N] = 2 * grad_post.T * gate * (1 - gate)
            kept, _ = _sinkhorn_rounds(logits[2 * N :].view(N, N, T), ctx.eps, ctx.iterations)
            grad_comb = grad_comb.permute(1, 2, 0).contiguous()  # [N, N, T]
            grad_logits[2 * N :] = _sinkhorn_backward(grad_comb, kept, ctx.eps).flatten(0, 1)

        grad_base = grad_logits.sum(dim=1)
        grad_scale = torch.linalg.vecdot(grad_logits, mixes.T)  # [M]
        parts = (N,) if scale.numel() == 1 else (N, N, N * N)
        grad_scale = torch.stack([part.sum() for part in grad_scale.split(parts)])
        per_row = scale if scale.numel() == 1 else scale.repeat_interleave(scale.new_tensor(parts).long())
        grad_mixes = (grad_logits * per_row[:, None]).T.contiguous()  # [T, M]
        # mixes = r fn.x with r = 1 / rms: the streams enter through the product and through r.
        along = -torch.linalg.vecdot(grad_mixes, mixes)[:, None] * inverse_rms.square() / (N * D)  # [T, 1]
        grad_mixes.mul_(inverse_rms)
        grad_fn = torch.zeros_like(fn)
        grad_streams = torch.empty_like(streams)
        for t in range(0, T, TOKENS_AT_ONCE):
            now = slice(t, t + TOKENS_AT_ONCE)
            flat = streams[now].flatten(1).to(fn.dtype)
            grad_fn.addmm_(grad_mixes[now].T, flat)
            grad_flat = torch.mm(grad_mixes[now], fn).addcmul_(flat, along[now])
            grad_flat.view(-1, N, D).addcmul_(pre_weights[now, :, None], grad_u[now, None].to(fn.dtype))
            grad_streams[now] = grad_flat.view(-1, N, D)
        return grad_streams, grad_fn, grad_base, grad_scale, None, None, None


class _Post(torch.autograd.Function):
    @staticmethod
    def forward(ctx, streams, y, post_weights, comb):
        out = torch.empty_like(streams)
        wide = comb.dtype
        for t in range(0, streams.shape[0], TOKENS_AT_ONCE):
            now = slice(t, t + TOKENS_AT_ONCE)
            written = post_weights[now, :, None] * y[now, None].to(wide)  # [t, N, D]
            out[now] = torch.baddbmm(written, comb[now].transpose(1, 2), streams[now].to(wide))
        ctx.save_for_backward(streams, y, post_weights, comb)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        streams, y, post_weights, comb = ctx.saved_tensors
        grad_streams, grad_y = torch.empty_like(streams), torch.empty_like(y)
        grad_post, grad_comb = torch.empty_like(post_weights), torch.empty_like(comb)
        wide = comb.dtype
        for t in range(0, streams.shape[0], TOKENS_AT_ONCE):
            now = slice(t, t + TOKENS_AT_ONCE)
            grad_now = grad[now].to(wide)  # [t, N, D]
            grad_streams[now] = torch.bmm(comb[now], grad_now)
            grad_y[now] = torch.bmm(post_weights[now, None], grad_now)[:, 0]
            grad_post[now] = torch.bmm(grad_now, y[now, :, None].to(wide))[..., 0]
            grad_comb[now] = torch.bmm(streams[now].to(wide), grad_now.transpose(1, 2))
        return grad_streams, grad_y, grad_post, grad_comb
