"""Hyper-connections on the CPU, each pass over the streams one C kernel (``native/mhc.c``).

What is kept for backward and what is formed again is as in ``portable``, which serves whatever the kernels do not:
other dtypes, other devices, more than 8 streams.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from dsv4 import native
from dsv4.ops.mhc import portable
from dsv4.ops.mhc.portable import affine, per_mix, split_scale

MOST_STREAMS = 8
LANES = 16  # rows of fn are padded to a multiple of this
BLOCK = 64  # tokens of one partial sum
VERY_SMALL = 8  # fewer tokens than this are not worth splitting over threads


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
    if not _serves(streams):
        return portable.pre(streams, fn, base, scale, norm_weight, norm_eps, eps, iterations)
    B, T, N, D = streams.shape
    flat = streams.flatten(0, 1)
    if native.wants_gradient(streams, fn, base, scale, norm_weight):
        x, post_weights, comb, carried = _Pre.apply(flat, fn, base, scale, norm_weight, norm_eps, eps, iterations)
    else:
        carried = flat.contiguous()
        x, post_weights, comb, _, _ = _read(carried, fn, base, scale, norm_weight, norm_eps, eps, iterations)
    return x.view(B, T, D), post_weights.view(B, T, N), comb.view(B, T, N, N), carried.view(B, T, N, D)


def post(streams: torch.Tensor, y: torch.Tensor, post_weights: torch.Tensor, comb: torch.Tensor) -> torch.Tensor:
    """See ``dsv4.ops.mhc.post``."""
    if not _serves(streams) or y.dtype != streams.dtype:
        return portable.post(streams, y, post_weights, comb)
    flat = [x.flatten(0, 1) for x in (streams, y, post_weights, comb)]
    mixed = _Post.apply(*flat) if native.wants_gradient(*flat) else _write([x.contiguous() for x in flat])
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
    if not _serves(streams):
        return portable.head(streams, fn, base, scale, norm_weight, norm_eps, eps)
    flat = streams.flatten(0, 1)
    if native.wants_gradient(streams, fn, base, scale, norm_weight):
        x = _Pre.apply(flat, fn, base, scale, norm_weight, norm_eps, eps, 0)[0]
    else:
        x = _read(flat.contiguous(), fn, base, scale, norm_weight, norm_eps, eps, 0)[0]
    return x.view(*streams.shape[:2], streams.shape[-1])


def sinkhorn(logits: torch.Tensor, eps: float, iterations: int) -> torch.Tensor:
    """See ``dsv4.ops.mhc.sinkhorn``."""
    N = logits.shape[-1]
    if not native.serves(logits) or logits.dtype != torch.float32 or N > MOST_STREAMS:
        return portable.sinkhorn(logits, eps, iterations)
    token_last = logits.reshape(-1, N * N).T.contiguous()  # [N N, T]
    return _Sinkhorn.apply(token_last, eps, iterations).view(logits.shape)


def _serves(streams: torch.Tensor) -> bool:
    return native.serves(streams) and streams.shape[2] <= MOST_STREAMS


def _threads(T: int) -> int:
    return torch.get_num_threads() if T >= VERY_SMALL else 1


def _doubly_stochastic(logits: torch.Tensor, N: int, eps: float, iterations: int) -> torch.Tensor:
    """[N N, T] to [T, N, N]."""
    T = logits.shape[1]
    comb = logits.new_empty(T, N, N)
    native.call("dsv4_mhc_sinkhorn", T, N, iterations, eps, _threads(T), logits, comb)
    return comb


def _doubly_stochastic_backward(grad: torch.Tensor, logits: torch.Tensor, eps: float, iterations: int) -> torch.Tensor:
    """[T, N, N] to [N N, T]."""
    T, N, _ = grad.shape
    grad_logits = torch.empty_like(logits)
    native.call(
        "dsv4_mhc_sinkhorn_backward", T, N, iterations, eps, _threads(T), logits, grad.contiguous(), grad_logits
    )
    return grad_logits


class _Sinkhorn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, eps, iterations):
        ctx.save_for_backward(logits)
        ctx.eps, ctx.iterations = eps, iterations
        return _doubly_stochastic(logits, round(logits.shape[0] ** 0.5), eps, iterations)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (logits,) = ctx.saved_tensors
        return _doubly_stochastic_backward(grad, logits, ctx.eps, ctx.iterations), None, None


def _read(
    streams: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_eps: float,
    eps: float,
    iterations: int,
) -> tuple[torch.Tensor, ...]:
    """Read [T, N, D]: returns x, post weights and comb, and for backward the mixes [T, M] and inverse RMS [T, 1]."""
    T, N, D = streams.shape
    M = fn.shape[0]
    x, mixes, inverse_rms = streams.new_empty(T, D), fn.new_empty(T, M), fn.new_empty(T, 1)
    post_weights, logits = (fn.new_empty(T, N), fn.new_empty(N * N, T)) if iterations else (fn.new_empty(0),) * 2
    if not native.serves(norm_weight):
        norm_weight = norm_weight.float()
    if N * D % LANES:
        fn = F.pad(fn, (0, -N * D % LANES))
    native.call(
        "dsv4_mhc_pre", T, N, D, M, native.is_bfloat16(streams), native.is_bfloat16(norm_weight),
        torch.get_num_threads(), streams, fn.contiguous(), base.contiguous(), scale.contiguous(),
        norm_weight.contiguous(), norm_eps, eps, x, mixes, inverse_rms, post_weights, logits,
    )  # fmt: skip
    comb = _doubly_stochastic(logits, N, eps, iterations) if iterations else fn.new_empty(0)
    return x, post_weights, comb, mixes, inverse_rms


class _Pre(torch.autograd.Function):
    """Reading and normalisation. With no iterations there is a head's read alone, without post and comb."""

    @staticmethod
    def forward(ctx, streams, fn, base, scale, norm_weight, norm_eps, eps, iterations):
        streams = streams.contiguous()
        x, post_weights, comb, *formed = _read(streams, fn, base, scale, norm_weight, norm_eps, eps, iterations)
        ctx.save_for_backward(streams, fn, base, scale, norm_weight, *formed)
        ctx.norm_eps, ctx.eps, ctx.iterations = norm_eps, eps, iterations
        ctx.set_materialize_grads(False)
        return x, post_weights, comb, streams.view_as(streams)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_x, grad_post, grad_comb, grad_carried):
        streams, fn, base, scale, norm_weight, mixes, inverse_rms = ctx.saved_tensors
        T, N, D = streams.shape
        head = T, N, D, native.is_bfloat16(streams), _threads(T)
        logits = affine(mixes, base, scale, N)
        gates = torch.sigmoid(logits[: 2 * N])
        slope = gates * (1 - gates)  # [2N, T], or [N, T] at the head
        pre_weights = (gates[:N] + ctx.eps).T.contiguous()  # [T, N]
        grad_logits = torch.zeros_like(logits)
        grad_u, grad_norm = None, torch.zeros_like(norm_weight)
        if grad_x is not None:
            grad_u, grad_read = fn.new_empty(T, D), fn.new_empty(T, N)
            grad_norm = fn.new_empty(-(-T // BLOCK), D)
            native.call(
                "dsv4_mhc_pre_backward_read", *head, streams, pre_weights, norm_weight.float().contiguous(),
                ctx.norm_eps, grad_x.to(streams.dtype).contiguous(), grad_u, grad_read, grad_norm,
            )  # fmt: skip
            grad_norm = grad_norm.sum(dim=0).to(norm_weight.dtype)
            grad_logits[:N] = grad_read.T * slope[:N]
        if grad_post is not None:
            grad_logits[N : 2 * N] = 2 * grad_post.T * slope[N:]
        if grad_comb is not None:
            grad_logits[2 * N :] = _doubly_stochastic_backward(grad_comb, logits[2 * N :], ctx.eps, ctx.iterations)
        # mixes = r fn.x with r = 1 / rms: the streams enter through the product and through r.
        grad_mixes = grad_logits.T * per_mix(scale, N)  # [T, M]
        along = (grad_mixes * mixes).sum(dim=-1) * inverse_rms[:, 0].square() / (-N * D)  # [T]
        narrow = grad_mixes.mul_(inverse_rms).to(streams.dtype)
        grad_fn = torch.mm(narrow.T, streams.flatten(1)).to(fn.dtype)
        grad_streams = torch.mm(narrow, fn.to(streams.dtype)).view_as(streams)
        if grad_carried is not None:
            grad_carried = grad_carried.contiguous()
        native.call(
            "dsv4_mhc_pre_backward_streams", *head, streams, pre_weights, along, grad_u, grad_carried, grad_streams
        )
        grad_scale = (grad_logits * mixes.T).sum(dim=1)  # [M]
        grad_scale = torch.stack([part.sum() for part in grad_scale.split(split_scale(scale, N))])
        return grad_streams, grad_fn, grad_logits.sum(dim=1), grad_scale, grad_norm, None, None, None


def _write(flat: list[torch.Tensor]) -> torch.Tensor:
    """Write streams [T, N, D] from streams, y, post weights and comb, all contiguous."""
    T, N, D = flat[0].shape
    out = torch.empty_like(flat[0])
    native.call("dsv4_mhc_post", T, N, D, native.is_bfloat16(out), _threads(T), *flat, out)
    return out


class _Post(torch.autograd.Function):
    @staticmethod
    def forward(ctx, streams, y, post_weights, comb):
        kept = [x.contiguous() for x in (streams, y, post_weights, comb)]
        ctx.save_for_backward(*kept)
        return _write(kept)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        kept = ctx.saved_tensors  # asked for once: streams may be formed again for each time
        T, N, D = kept[0].shape
        grads = [torch.empty_like(x) for x in kept]
        native.call(
            "dsv4_mhc_post_backward", T, N, D, native.is_bfloat16(kept[0]), _threads(T),
            *kept, grad.contiguous(), *grads,
        )  # fmt: skip
        return tuple(grads)
