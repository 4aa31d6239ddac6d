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
    norm_weight: torch.Tensor,
    norm_eps: float,
    eps: float,
    iterations: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See ``dsv4.ops.mhc.pre``."""
    B, T, N, D = streams.shape
    x, post_weights, comb, carried = _Pre.apply(
        streams.flatten(0, 1), fn, base, scale, norm_weight, norm_eps, eps, iterations
    )
    return x.view(B, T, D), post_weights.view(B, T, N), comb.view(B, T, N, N), carried.view(B, T, N, D)


def post(streams: torch.Tensor, y: torch.Tensor, post_weights: torch.Tensor, comb: torch.Tensor) -> torch.Tensor:
    """See ``dsv4.ops.mhc.post``."""
    mixed = _Post.apply(streams.flatten(0, 1), y.flatten(0, 1), post_weights.flatten(0, 1), comb.flatten(0, 1))
    return mixed.view(streams.shape)


def head(
    streams: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_eps: float,
    eps: float,
) -> torch.Tensor:
    """See ``dsv4.ops.mhc.head``."""
    x, _, _, _ = _Pre.apply(streams.flatten(0, 1), fn, base, scale, norm_weight, norm_eps, eps, 0)
    return x.view(*streams.shape[:2], streams.shape[-1])


def sinkhorn(logits: torch.Tensor, eps: float, iterations: int) -> torch.Tensor:
    """See ``dsv4.ops.mhc.sinkhorn``."""
    N = logits.shape[-1]
    token_last = logits.reshape(-1, N, N).permute(1, 2, 0)  # [N, N, T]
    return _Sinkhorn.apply(token_last, eps, iterations).permute(2, 0, 1).reshape(logits.shape)


def _sinkhorn_rounds(
    logits: torch.Tensor, eps: float, iterations: int
) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Return the bare softmax of [N, N, T] logits, and each normalisation's result with its divisor."""
    softmax = logits.softmax(dim=1)
    comb = softmax + eps
    rounds = []
    for half_round in range(2 * iterations - 1):
        total = comb.sum(dim=half_round % 2, keepdim=True).add_(eps)
        comb = comb / total
        rounds.append((comb, total))
    return softmax, rounds


def _sinkhorn_backward(
    grad: torch.Tensor, softmax: torch.Tensor, rounds: list[tuple[torch.Tensor, torch.Tensor]]
) -> torch.Tensor:
    """Gradient of the logits from that of the result."""
    for half_round in range(len(rounds) - 1, -1, -1):
        comb, total = rounds[half_round]
        grad = (grad - (grad * comb).sum(dim=half_round % 2, keepdim=True)).div_(total)
    return softmax * (grad - (grad * softmax).sum(dim=1, keepdim=True))


class _Sinkhorn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, eps, iterations):
        ctx.save_for_backward(logits)
        ctx.eps, ctx.iterations = eps, iterations
        return _sinkhorn_rounds(logits, eps, iterations)[1][-1][0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (logits,) = ctx.saved_tensors
        return _sinkhorn_backward(grad, *_sinkhorn_rounds(logits, ctx.eps, ctx.iterations)), None, None


def split_scale(scale: torch.Tensor, N: int) -> tuple[int, ...]:
    """How many mixes each number of the scale multiplies: pre, post and comb, or pre alone at the head."""
    return (N, N, N * N) if scale.numel() == 3 else (N,)


def per_mix(scale: torch.Tensor, N: int) -> torch.Tensor:
    """The scale of each mix, [M]."""
    return torch.cat([one.expand(size) for one, size in zip(scale, split_scale(scale, N), strict=True)])


def affine(mixes: torch.Tensor, base: torch.Tensor, scale: torch.Tensor, N: int) -> torch.Tensor:
    """The affine map of the mixes, token-last: [M, T]."""
    return torch.addcmul(base[:, None], per_mix(scale, N)[:, None], mixes.T).contiguous()


class _Pre(torch.autograd.Function):
    """Reading and normalisation. With no iterations there is a head's read alone, without post and comb."""

    @staticmethod
    def forward(ctx, streams, fn, base, scale, norm_weight, norm_eps, eps, iterations):
        T, N, D = streams.shape
        mixes, inverse_rms = fn.new_empty(T, fn.shape[0]), fn.new_empty(T, 1)
        x = streams.new_empty(T, D)
        for t in range(0, T, TOKENS_AT_ONCE):
            now = slice(t, t + TOKENS_AT_ONCE)
            wide = streams[now].to(fn.dtype)  # [t, N, D]
            inverse_rms[now] = _inverse_rms(wide.flatten(1), norm_eps)
            mixes[now] = torch.mm(wide.flatten(1), fn.T).mul_(inverse_rms[now])
            pre_weights = torch.sigmoid(mixes[now, :N] * scale[0] + base[:N]) + eps  # [t, N]
            u = _read(wide, pre_weights, streams.dtype)
            x[now] = u.mul_(_inverse_rms(u, norm_eps)).mul_(norm_weight.to(u.dtype))
        logits = affine(mixes, base, scale, N)  # [M, T]
        post_weights = (2 * torch.sigmoid(logits[N : 2 * N])).T.contiguous()  # [T, N], empty at the head
        comb = fn.new_empty(0)
        if iterations:
            _, rounds = _sinkhorn_rounds(logits[2 * N :].view(N, N, T), eps, iterations)
            comb = rounds[-1][0].permute(2, 0, 1).contiguous()  # [T, N, N]
        ctx.save_for_backward(streams, fn, base, scale, norm_weight, mixes, inverse_rms)
        ctx.norm_eps, ctx.eps, ctx.iterations = norm_eps, eps, iterations
        ctx.set_materialize_grads(False)
        return x, post_weights, comb, streams.view_as(streams)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_x, grad_post, grad_comb, grad_carried):
        streams, fn, base, scale, norm_weight, mixes, inverse_rms = ctx.saved_tensors
        T, N, D = streams.shape
        logits = affine(mixes, base, scale, N)
        gates = torch.sigmoid(logits[: 2 * N])
        slope = gates * (1 - gates)  # [2N, T], or [N, T] at the head
        pre_weights = (gates[:N] + ctx.eps).T.contiguous()  # [T, N]
        grad_logits = torch.zeros_like(logits)
        if grad_post is not None:
            grad_logits[N : 2 * N] = 2 * grad_post.T * slope[N:]
        if grad_comb is not None:
            rounds = _sinkhorn_rounds(logits[2 * N :].view(N, N, T), ctx.eps, ctx.iterations)
            grad_logits[2 * N :] = _sinkhorn_backward(grad_comb.permute(1, 2, 0).contiguous(), *rounds).flatten(0, 1)
        factor = per_mix(scale, N)
        narrow_fn = fn.to(streams.dtype)  # the two large products of backward run in the dtype of the streams
        grad_fn, grad_norm = torch.zeros_like(fn), torch.zeros_like(norm_weight, dtype=fn.dtype)
        grad_streams = torch.empty_like(streams)
        for t in range(0, T, TOKENS_AT_ONCE):
            now = slice(t, t + TOKENS_AT_ONCE)
            wide = streams[now].to(fn.dtype)  # [t, N, D]
            grad_logits_now, grad_wide = grad_logits[:, now], None
            if grad_x is not None:
                u = _read(wide, pre_weights[now], streams.dtype)
                grad_u = _norm_backward_(grad_x[now].to(fn.dtype), u, norm_weight, ctx.norm_eps, grad_norm)[:, None]
                grad_logits_now[:N] = (wide * grad_u).sum(dim=-1).T * slope[:N, now]
                grad_wide = pre_weights[now, :, None] * grad_u
            grad_mixes = grad_logits_now.T * factor  # [t, M]
            # mixes = r fn.x with r = 1 / rms: the streams enter through the product and through r.
            r = inverse_rms[now]
            along = (grad_mixes * mixes[now]).sum(dim=-1, keepdim=True) * r.square() / (-N * D)  # [t, 1]
            grad_mixes.mul_(r)
            narrow = grad_mixes.to(streams.dtype)
            grad_fn += torch.mm(narrow.T, streams[now].flatten(1))
            grad_now = torch.mm(narrow, narrow_fn).view_as(wide).to(fn.dtype).addcmul_(wide, along[..., None])
            if grad_wide is not None:
                grad_now += grad_wide
            if grad_carried is not None:
                grad_now += grad_carried[now].to(fn.dtype)
            grad_streams[now] = grad_now
        grad_scale = (grad_logits * mixes.T).sum(dim=1)  # [M]
        grad_scale = torch.stack([part.sum() for part in grad_scale.split(split_scale(scale, N))])
        grad_norm = grad_norm.to(norm_weight.dtype)
        return grad_streams, grad_fn, grad_logits.sum(dim=1), grad_scale, grad_norm, None, None, None


def _inverse_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.rsqrt(norm.square() / x.shape[-1] + eps)


def _read(wide: torch.Tensor, pre_weights: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Sum the streams [t, N, D] with these weights, rounded to dtype and back: [t, D] wide."""
    return torch.bmm(pre_weights[:, None], wide)[:, 0].to(dtype).to(wide.dtype)


def _norm_backward_(
    grad: torch.Tensor, u: torch.Tensor, weight: torch.Tensor, eps: float, grad_weight: torch.Tensor
) -> torch.Tensor:
    """The gradient of u [t, D] through its normalisation; adds that of the weight into grad_weight."""
    inverse_rms = _inverse_rms(u, eps)
    normed = u * inverse_rms
    grad_weight += (grad * normed).sum(dim=0)
    grad = grad * weight.to(grad.dtype)
    along = (grad * normed).sum(dim=-1, keepdim=True) / u.shape[-1]
    return grad.addcmul_(normed, along, value=-1).mul_(inverse_rms)


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
            grad_post[now] = (grad_now * y[now, None].to(wide)).sum(dim=-1)
            grad_comb[now] = torch.bmm(streams[now].to(wide), grad_now.transpose(1, 2))
        return grad_streams, grad_y, grad_post, grad_comb
