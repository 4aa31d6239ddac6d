"""Attention as Triton kernels: a program per block of lines, which are the heads of queries, one after the other.

All heads of a query see the same keys, so 64 heads are a tile as the tensor cores want it, and a tile of keys, once in
shared memory, serves twice: as keys and as values. Of few heads, a block holds several queries: their windows are
nearly the same, and so are intervals; picks go by query. Window and interval are contiguous rows, picked entries are
gathered by their index. The softmax runs along, in base 2, since exp2 is what the hardware has.

A query's result depends on its own keys alone, taken in order: of several queries, tiles begin at fixed places, and one
in which a line sees nothing changes none of its bits. The backward kernels are in ``triton_backward.py`` and
``triton_keys.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from dsv4.ops.attend.triton_backward import LOG2_E, Config, Seen, lines_of, query_gradient, spans, unseen
from dsv4.ops.attend.triton_keys import key_gradients

if TYPE_CHECKING:
    from dsv4.ops.attend import Entries

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CONFIGS = {
    # 64 lines x 512 channels of float32 sums are half the registers of a multiprocessor: 8 warps share them. Beside
    # 64 KiB of queries, of the 228 KiB of shared memory: two tiles of 64 KiB, or three of 32 KiB.
    "wide": Config(64, 64, 8, 2),
    "deep": Config(64, 32, 8, 3),
    # float32 has no tensor cores here, and twice the bytes.
    "float32": Config(16, 16, 4, 1),
}
NARROW = "wide"  # the one for 16-bit dtypes


def attend(
    q: torch.Tensor,
    kv: torch.Tensor,
    sink: torch.Tensor,
    raw_begin: torch.Tensor,
    entries: Entries | None,
    window: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``dsv4.ops.attend``. q, kv and the values of entries share one dtype: float32, float16 or bfloat16."""
    if entries is None:
        values, picked, begin, end = kv.new_empty(kv.shape[0], 0, kv.shape[2]), None, raw_begin, raw_begin
    else:
        values, picked, begin, end = entries
    if q.dtype not in DTYPES:
        raise ValueError(f"q has dtype {q.dtype}; expected float32, float16 or bfloat16 for the Triton kernels")
    for name, given in (("kv", kv), ("entries.values", values)):
        if given.dtype != q.dtype:
            raise ValueError(f"{name} has dtype {given.dtype}; expected {q.dtype}, that of q, for the Triton kernels")
    return _Attend.apply(q, kv, sink, raw_begin, values, picked, begin, end, window, scale)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, kv, sink, raw_begin, values, picked, begin, end, window, scale):
        q, kv, values, raw_begin = q.contiguous(), kv.contiguous(), values.contiguous(), raw_begin.contiguous()
        seen = Seen.of(raw_begin, picked, begin, end, values.shape[1])
        out = torch.empty_like(q)
        log_total = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)  # [B, T, H], base 2
        log_sink = sink.float() * LOG2_E
        if q.numel():
            _launch_forward(q, kv, log_sink, values, seen, out, log_total, window, scale)
        ctx.save_for_backward(q, kv, sink, values, out, log_total, *seen.tensors())
        ctx.kind, ctx.window, ctx.scale = seen.kind, window, scale
        log_sum_exp = log_total / LOG2_E
        ctx.mark_non_differentiable(log_sum_exp)
        return out, log_sum_exp

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, _):
        q, kv, sink, values, out, log_total, *tensors = ctx.saved_tensors
        seen = Seen(ctx.kind, *tensors)
        log_sink = sink.float() * LOG2_E
        given = (q, kv, values, seen, ctx.window, ctx.scale, log_total)
        grad_out = grad_out.contiguous()
        grad_q, delta, grad_values = query_gradient(*given, out, grad_out)
        grad_kv = key_gradients(*given, delta, grad_out, grad_values)
        # A few numbers per query: the sink takes part in the denominator alone.
        grad_sink = -(torch.exp2(log_sink - log_total) * delta).sum(dim=(0, 1))  # [H]
        return grad_q, grad_kv, grad_sink.to(sink.dtype), None, grad_values.to(values.dtype), *([None] * 5)


def _launch_forward(
    q: torch.Tensor,
    kv: torch.Tensor,
    log_sink: torch.Tensor,
    values: torch.Tensor,
    seen: Seen,
    out: torch.Tensor,
    log_total: torch.Tensor,
    window: int,
    scale: float,
) -> None:
    B, T, H, K = q.shape
    config = CONFIGS["float32" if q.dtype == torch.float32 else NARROW]
    _forward[(B * triton.cdiv(T * H, config.lines),)](
        q,
        kv,
        values,
        log_sink.contiguous(),
        *seen.tensors(),
        out,
        log_total,
        T,
        kv.shape[1],
        values.shape[1],
        seen.picked.shape[-1],
        window,
        scale * LOG2_E,
        KIND=seen.kind,
        H=H,
        K=K,
        LINES=config.lines,
        BLOCK_K=max(16, triton.next_power_of_2(K)),
        BLOCK_N=config.keys,
        STAGES=config.stages,
        num_warps=config.warps,
    )


@triton.jit
def _forward(
    q_ptr,
    kv_ptr,
    values_ptr,
    log_sink_ptr,
    raw_begin_ptr,
    picked_ptr,
    begin_ptr,
    end_ptr,
    out_ptr,
    log_total_ptr,
    T,
    S,
    C,
    P,
    window,
    log2_scale,
    KIND: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    LINES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One block of lines. Past 60 lines, since loads and the order of sums are one thought."""
    row, line, t, is_line, first_t, last_t = lines_of(tl.program_id(0), T, H, LINES)
    channel = tl.arange(0, BLOCK_K)[None, :]
    is_channel = channel < K
    place = tl.arange(0, BLOCK_N)
    of_lines = row * T * H + line
    at = of_lines[:, None] * K + channel
    is_q = is_line[:, None] & is_channel
    q = tl.load(q_ptr + at, mask=is_q, other=0.0)  # [m, k]
    log_sink = tl.load(log_sink_ptr + line % H, mask=is_line, other=0.0)
    # A sink of -inf takes no part, and must not make the first difference inf - inf.
    peak = tl.maximum(log_sink, -1e30)
    total = tl.exp2(log_sink - peak)
    acc = tl.zeros((LINES, BLOCK_K), dtype=tl.float32)

    first, last, start_at, stop = spans(
        "raw", raw_begin_ptr, raw_begin_ptr, row, t, is_line, first_t, last_t, T, S, window, H, LINES, BLOCK_N
    )
    for start in tl.range(start_at, stop, BLOCK_N, num_stages=STAGES):
        raw = start + place
        keys_at = kv_ptr + (row * S + raw)[:, None] * K + channel
        keys = tl.load(keys_at, mask=(raw < stop)[:, None] & is_channel, other=0.0)  # [n, k]
        acc, peak, total = _meet(q, keys, unseen(raw, first, last), acc, peak, total, log2_scale, T, S)
    if KIND == "interval":
        first, last, start_at, stop = spans(
            "interval", begin_ptr, end_ptr, row, t, is_line, first_t, last_t, T, C, window, H, LINES, BLOCK_N
        )
        for start in tl.range(start_at, stop, BLOCK_N, num_stages=STAGES):
            entry = start + place
            keys_at = values_ptr + (row * C + entry)[:, None] * K + channel
            keys = tl.load(keys_at, mask=(entry < stop)[:, None] & is_channel, other=0.0)
            acc, peak, total = _meet(q, keys, unseen(entry, first, last), acc, peak, total, log2_scale, T, S)
    if KIND == "picked":
        tiles = tl.cdiv(P, BLOCK_N)
        for step in tl.range(0, (last_t - first_t + 1) * tiles, num_stages=STAGES):
            pick = step % tiles * BLOCK_N + place
            query = first_t + step // tiles
            entry = tl.load(picked_ptr + (row * T + query) * P + pick, mask=pick < P, other=-1)
            keys_at = values_ptr + (row * C + entry)[:, None] * K + channel
            keys = tl.load(keys_at, mask=(entry >= 0)[:, None] & is_channel, other=0.0)
            is_unseen = (entry < 0)[None, :]
            if H % LINES != 0:
                is_unseen = is_unseen | (t != query)[:, None]
            acc, peak, total = _meet(q, keys, is_unseen, acc, peak, total, log2_scale, T, S)

    tl.store(out_ptr + at, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=is_q)
    tl.store(log_total_ptr + of_lines, peak + tl.log2(total), mask=is_line)


@triton.jit
def _meet(q, keys, is_unseen, acc, peak, total, log2_scale, T, S):
    """Take a tile of keys into the running softmax: acc [m, k] and total [m] are relative to exp2(peak).

    Both conditions always hold, and are there for the compiler. What depends on the first it puts after the request for
    the next tile, which then arrives beside the products. And through the second it does not see that one product feeds
    another: for that, it would form the first twice, by each half of the warps.
    """
    if T > 0:
        shares = tl.zeros((q.shape[0], keys.shape[0]), dtype=keys.dtype)
        shrink = tl.zeros_like(peak)
        if S > 0:
            scores = tl.dot(q, tl.trans(keys), input_precision="ieee") * log2_scale  # [m, n]
            scores = tl.where(is_unseen, float("-inf"), scores)
            new_peak = tl.maximum(peak, tl.max(scores, axis=1))
            shrink = tl.exp2(peak - new_peak)
            weights = tl.exp2(scores - new_peak[:, None])
            total = total * shrink + tl.sum(weights, axis=1)
            peak = new_peak
            shares = weights.to(keys.dtype)
        acc = tl.dot(shares, keys, acc * shrink[:, None], input_precision="ieee")
    return acc, peak, total
