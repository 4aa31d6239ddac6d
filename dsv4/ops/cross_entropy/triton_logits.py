"""Logits of a slice of tokens as float32 sums, and the other products of a head, around kernels that read them in rows.

Logits are float32 products whatever the vectors are. A float32 weight, as masters are, meets bfloat16 activations in
three products in one: it is exactly the sum of three bfloat16 numbers, which lie side by side as one product's longer
rows. That is five products' time in all, where one in float32 takes as long as ten.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dsv4.ops.lowbit.triton_codes import bits_of, cast, number_of, raw_bits

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of activations
TOKENS_OF_A_TILE = 128  # a slice is a multiple of these, as the products like it
PARTS = 3  # bfloat16 numbers, 8 bits each, of one of float32
BLOCK = 4096  # channels of a row that are split at a time
WARPS = 8


def head_of(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The weight for the logits of activations of this dtype, [V, D] or in parts [V, 3 D]."""
    if weight.dtype == dtype:
        return weight
    if (weight.dtype, dtype) != (torch.float32, torch.bfloat16):
        return weight.float()
    weight = weight.contiguous()
    V, D = weight.shape
    parts = torch.empty(V, PARTS * D, dtype=dtype, device=weight.device)
    if D:
        block = min(triton.next_power_of_2(D), BLOCK)
        _split_kernel[(V, triton.cdiv(D, block))](weight, raw_bits(parts), D, PARTS, block, num_warps=WARPS)
    return parts


def rounded_head(head: torch.Tensor, dtype: torch.dtype, D: int) -> torch.Tensor:
    """The weight rounded to the dtype of activations, [V, D], of what ``head_of`` made: in parts, the first of them."""
    return head[:, :D].to(dtype)


def form_logits(x: torch.Tensor, head: torch.Tensor, out: torch.Tensor) -> None:
    """x: [n, D]; head: of ``head_of``; out: [n, V] float32, written."""
    wide = x.to(head.dtype)
    multiply(wide if head.shape[1] == x.shape[1] else wide.repeat(1, PARTS), head.T, out)


def slice_size(T: int, V: int, held: int) -> int:
    """Tokens of a slice: as few slices as ``held`` logits allow, of one size but for the last."""
    most = max(TOKENS_OF_A_TILE, held // V // TOKENS_OF_A_TILE * TOKENS_OF_A_TILE)
    if most >= T:
        return max(T, 1)
    even = triton.cdiv(T, triton.cdiv(T, most))
    return triton.cdiv(even, TOKENS_OF_A_TILE) * TOKENS_OF_A_TILE


def multiply(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, *, adds: bool = False) -> None:
    """out = a b, or with ``adds`` out + a b, summed and kept in float32. a and b: [n, k] and [k, m] of one dtype."""
    if a.dtype != out.dtype and a.device.type == "cpu":  # which has no product with a wider sum
        a, b = a.to(out.dtype), b.to(out.dtype)
    widens = {} if a.dtype == out.dtype else {"out_dtype": out.dtype}
    if adds:
        torch.addmm(out, a, b, **widens, out=out)
    else:
        torch.mm(a, b, **widens, out=out)


@triton.jit
def _split_kernel(weight, parts, D, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Some channels of a row as a sum: each part is what bfloat16 has of what is left."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    left = tl.load(weight + row * D + channel, mask=channel < D, other=0.0)
    for part in tl.static_range(PARTS):
        rounded = cast(left, tl.int16)
        tl.store(parts + row * (PARTS * D) + part * D + channel, rounded, mask=channel < D)
        taken = number_of(bits_of(rounded))
        is_number = tl.abs(taken) < float("inf")  # of what is none nothing is left
        left = tl.where(is_number, left, 0.0) - tl.where(is_number, taken, 0.0)
