"""What comes back through the experts, and each token's sum over its choices, which forward and backward end with.

With a the activation, r its routing weight, and G the gradient of the output, a row of each slot's token:

    dh = G w2,    dr = dh . a,    dgate and dup from r dh through the SwiGLU, formed again of the gate and up kept
    dx = dgate w1 + dup w3,       dw1 = dgate^T x,    dw3 = dup^T x,    dw2 = G^T (r a)

The first line is a kernel with r a on the side, the gradient of x one more, and that of the weights a program per tile
of each expert's matrices over all of its rows, in their order: an expert that has none gets zeros. Weights are only
multiplied by their columns here, so they are the left factor turned.
"""

# Kernels are a language of their own, in which a constexpr is a number and tensors are cut by None.

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from dsv4.ops.experts.triton_sort import Sorted
from dsv4.ops.experts.triton_swiglu import activation_backward
from dsv4.ops.linear.triton_product import Coded, Config, as_read, config_of, matrix_of, products, tile_of
from dsv4.ops.lowbit.tables import ACTIVATION_GROUP
from dsv4.ops.lowbit.triton import round_rows

TOGETHER = 8
CHANNELS, PARTS = 1024, 1024  # of a program that sums choices, and that sums parts
CONFIGS = {
    # Rows and columns of a weight's gradient, and slots at a time. As forward: two sums of 128 x 128.
    "16 bits": Config(64, 128, 128, 8, 3),
    "float32": Config(16, 32, 32, 4, 2),
}


class Kept(NamedTuple):
    """What forward keeps. x: rounded, where hidden rows are; gate, up: [n, F], in the order of experts."""

    x: torch.Tensor
    weights: torch.Tensor
    matrices: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    gate: torch.Tensor
    up: torch.Tensor
    groups: Sorted
    limit: float
    rounds: bool


class Inner(NamedTuple):
    """In the order of experts the weighted activation, and the gradients of gate and up, [n, F].

    parts: of the gradients of the routing weights those of each block of F, by slot, [n, blocks].
    """

    hidden: torch.Tensor
    gate: torch.Tensor
    up: torch.Tensor
    parts: torch.Tensor


def gradients(grad: torch.Tensor, kept: Kept, needed: Sequence[bool]) -> tuple[torch.Tensor | None, ...]:
    """The gradients of x, the routing weights, w1, w2 and w3, those that are needed. grad: [T, D] float32."""
    x, (w1, w2, _) = kept.x, kept.matrices
    grad = grad.to(x.dtype).contiguous()
    inner = _inner(grad, kept)
    grad_x = _inputs(kept, inner) if needed[0] else None
    grad_weights = _routing(kept, inner) if needed[1] else None
    grad_w1 = grad_w2 = grad_w3 = None
    if needed[2] or needed[4]:
        grad_w1, grad_w3 = _of_matrices((inner.gate, inner.up), x, kept, w1, gathers_left=False)
    if needed[3]:
        hidden = rows_rounded(inner.hidden) if kept.rounds else inner.hidden
        grad_w2, _ = _of_matrices((grad,), hidden, kept, w2, gathers_left=True)
    return grad_x, grad_weights, grad_w1, grad_w2, grad_w3


def rows_rounded(x: torch.Tensor) -> torch.Tensor:
    """x [n, K] as a map reads it that rounds: to E4M3 in groups of 128."""
    return round_rows(x, ACTIVATION_GROUP, x.shape[1])


def sum_choices(y: torch.Tensor, dtype: torch.dtype, own: torch.Tensor | None = None) -> torch.Tensor:
    """Add up y [T, A, D] over choices in float32, one after another, and ``own`` [T, D] last: [T, D] in ``dtype``."""
    T, A, D = y.shape
    out = torch.empty(T, D, dtype=dtype, device=y.device)
    if out.numel():
        channels = min(CHANNELS, triton.next_power_of_2(D))
        _sum_kernel[(T, triton.cdiv(D, channels))](
            y, y if own is None else own, out, D, A, own is not None, channels, num_warps=4
        )
    return out


def _inner(grad: torch.Tensor, kept: Kept) -> Inner:
    w2, (n, F) = as_read(kept.matrices[1]), kept.gate.shape
    D, A = grad.shape[1], kept.weights.shape[1]
    config = _config(kept, w2)
    blocks, tiles = triton.cdiv(F, config.rows), len(kept.groups.tile_expert)
    made = Inner(*(torch.empty_like(kept.gate) for _ in range(3)), grad.new_empty(n, blocks, dtype=torch.float32))
    _inner_kernel[(tiles * blocks,)](
        grad, *kept.groups, kept.weights.contiguous(), w2.numbers, kept.gate, kept.up, *made, kept.limit, tiles,
        D, F, A, TOGETHER, config.tokens, config.rows, config.step, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return made


def _config(kept: Kept, stack: Coded) -> Config:
    """The tile of forward, as which the slots are cut."""
    return config_of(kept.x.dtype, stack, len(kept.groups.slots) / len(stack.numbers))


def _inputs(kept: Kept, inner: Inner) -> torch.Tensor:
    w1, w3 = as_read(kept.matrices[0]), as_read(kept.matrices[2])
    n, F = kept.gate.shape
    (T, D), A = kept.x.shape, kept.weights.shape[1]
    config, tiles = _config(kept, w1), len(kept.groups.tile_expert)
    rows = kept.x.new_empty(n, D)
    _inputs_kernel[(tiles * triton.cdiv(D, config.rows),)](
        inner.gate, inner.up, *kept.groups, w1.numbers, w3.numbers, rows, tiles, D, F, TOGETHER,
        config.tokens, config.rows, config.step, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return sum_choices(rows.view(T, A, D), kept.x.dtype)


def _routing(kept: Kept, inner: Inner) -> torch.Tensor:
    n, blocks = inner.parts.shape
    grad = torch.empty_like(kept.weights, memory_format=torch.contiguous_format)
    _parts_kernel[(triton.cdiv(n, PARTS),)](inner.parts, grad, n, blocks, PARTS, num_warps=4)
    return grad


def _of_matrices(
    lefts: tuple[torch.Tensor, ...], right: torch.Tensor, kept: Kept, like: torch.Tensor, *, gathers_left: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of one or two stacks [E, N, K]: of each expert's rows left^T right.

    lefts: [n, N] by slots in the order of experts and right: [T, K] by tokens, or with gathers_left the other way.
    """
    E, N, K = like.shape
    config = CONFIGS["float32" if right.dtype == torch.float32 else "16 bits"]
    made = [torch.empty(E, N, K, dtype=like.dtype, device=like.device) for _ in lefts]
    _matrices_kernel[(E * triton.cdiv(N, config.rows) * triton.cdiv(K, config.step),)](
        lefts[0], lefts[-1], right, kept.groups.slots, kept.groups.starts, made[0], made[-1], N, K,
        kept.weights.shape[1], len(lefts) == 2, gathers_left, config.tokens, config.rows, config.step,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return made[0], made[-1]


@triton.jit(do_not_specialize=["num_tiles"])
def _inner_kernel(
    grad, slots, starts, tile_expert, tile_first, weights, w2, gate, up, hidden, grad_gate, grad_up, parts,
    limit, num_tiles, D: tl.constexpr, F: tl.constexpr, A: tl.constexpr,
    TOGETHER: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (F + ROWS - 1) // ROWS
    tile, block = tile_of(num_tiles, blocks, TOGETHER)
    expert = tl.load(tile_expert + tile)
    if expert >= 0:
        place = tl.load(tile_first + tile) + tl.arange(0, TOKENS)
        is_slot = place < tl.load(starts + expert + 1)
        slot = tl.load(slots + place, mask=is_slot, other=0)
        w2, _ = matrix_of(w2, w2, expert, D, F, "plain")
        acc = tl.zeros([ROWS, TOKENS], dtype=tl.float32)
        acc, _ = products(
            acc, acc, grad, (slot // A).to(tl.int64) * D, w2, w2, w2, w2, block * ROWS, 0, tl.cdiv(D, STEP),
            F, D, "plain", True, False, ROWS, STEP,
        )  # fmt: skip
        of_hidden = tl.trans(acc)  # [tokens, rows]
        row = block * ROWS + tl.arange(0, ROWS)
        at = place.to(tl.int64)[:, None] * F + row[None, :]
        is_in = is_slot[:, None] & (row < F)[None, :]
        g = tl.load(gate + at, mask=is_in, other=0.0).to(tl.float32)
        v = tl.load(up + at, mask=is_in, other=0.0).to(tl.float32)
        weight = tl.load(weights + slot, mask=is_slot, other=0.0).to(tl.float32)[:, None]
        made, of_gate, of_up = activation_backward(of_hidden * weight, g, v, limit)
        tl.store(hidden + at, (made * weight).to(hidden.dtype.element_ty), mask=is_in)
        tl.store(grad_gate + at, of_gate.to(grad_gate.dtype.element_ty), mask=is_in)
        tl.store(grad_up + at, of_up.to(grad_up.dtype.element_ty), mask=is_in)
        of_weight = tl.sum(of_hidden * made, axis=1)  # past F, where gate and up are 0, made is nothing
        tl.store(parts + slot.to(tl.int64) * blocks + block, of_weight, mask=is_slot)


@triton.jit(do_not_specialize=["num_tiles"])
def _inputs_kernel(
    grad_gate, grad_up, slots, starts, tile_expert, tile_first, w1, w3, rows, num_tiles,
    D: tl.constexpr, F: tl.constexpr, TOGETHER: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    tile, block = tile_of(num_tiles, tl.cdiv(D, ROWS), TOGETHER)
    expert = tl.load(tile_expert + tile)
    if expert >= 0:
        first = tl.load(tile_first + tile)
        place = first + tl.arange(0, TOKENS)
        is_slot = place < tl.load(starts + expert + 1)
        read = tl.where(is_slot, place, first).to(tl.int64) * F
        w1, _ = matrix_of(w1, w1, expert, F, D, "plain")
        w3, _ = matrix_of(w3, w3, expert, F, D, "plain")
        acc = tl.zeros([ROWS, TOKENS], dtype=tl.float32)
        acc, _ = products(
            acc,
            acc,
            grad_gate,
            read,
            w1,
            w1,
            w1,
            w1,
            block * ROWS,
            0,
            tl.cdiv(F, STEP),
            D,
            F,
            "plain",
            True,
            False,
            ROWS,
            STEP,
        )
        acc, _ = products(
            acc,
            acc,
            grad_up,
            read,
            w3,
            w3,
            w3,
            w3,
            block * ROWS,
            0,
            tl.cdiv(F, STEP),
            D,
            F,
            "plain",
            True,
            False,
            ROWS,
            STEP,
        )
        slot = tl.load(slots + place, mask=is_slot, other=0)
        row = block * ROWS + tl.arange(0, ROWS)
        at = slot.to(tl.int64)[:, None] * D + row[None, :]
        tl.store(rows + at, tl.trans(acc).to(rows.dtype.element_ty), mask=is_slot[:, None] & (row < D)[None, :])


@triton.jit
def _matrices_kernel(
    left, other_left, right, slots, starts, made, other_made, N: tl.constexpr, K: tl.constexpr, A: tl.constexpr,
    IS_PAIR: tl.constexpr, GATHERS_LEFT: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    across: tl.constexpr = (K + COLUMNS - 1) // COLUMNS
    blocks: tl.constexpr = (N + ROWS - 1) // ROWS * across
    expert, block = program // blocks, program % blocks
    row, column = block // across * ROWS + tl.arange(0, ROWS), block % across * COLUMNS + tl.arange(0, COLUMNS)
    start, end = tl.load(starts + expert), tl.load(starts + expert + 1)
    acc = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    other = acc
    for first in range(start, end, SLOTS):
        place = first + tl.arange(0, SLOTS)
        is_slot = place < end
        token = (tl.load(slots + place, mask=is_slot, other=0) // A).to(tl.int64)
        place = place.to(tl.int64)
        of_left, of_right = (token, place) if GATHERS_LEFT else (place, token)
        at = of_left[:, None] * N + row[None, :]
        is_left = is_slot[:, None] & (row < N)[None, :]
        is_right = is_slot[:, None] & (column < K)[None, :]
        values = tl.load(right + of_right[:, None] * K + column[None, :], mask=is_right, other=0.0)
        acc = tl.dot(tl.trans(tl.load(left + at, mask=is_left, other=0.0)), values, acc, input_precision="ieee")
        if IS_PAIR:
            factor = tl.trans(tl.load(other_left + at, mask=is_left, other=0.0))
            other = tl.dot(factor, values, other, input_precision="ieee")
    at = (expert.to(tl.int64) * N + row)[:, None] * K + column[None, :]
    is_in = (row < N)[:, None] & (column < K)[None, :]
    tl.store(made + at, acc.to(made.dtype.element_ty), mask=is_in)
    if IS_PAIR:
        tl.store(other_made + at, other.to(other_made.dtype.element_ty), mask=is_in)


@triton.jit
def _sum_kernel(y, own, out, D: tl.constexpr, A: tl.constexpr, HAS_OWN: tl.constexpr, CHANNELS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    is_in = channel < D
    total = tl.zeros([CHANNELS], dtype=tl.float32)
    for choice in tl.static_range(A):
        total += tl.load(y + (token * A + choice) * D + channel, mask=is_in, other=0.0).to(tl.float32)
    if HAS_OWN:
        total += tl.load(own + token * D + channel, mask=is_in, other=0.0).to(tl.float32)
    tl.store(out + token * D + channel, total.to(out.dtype.element_ty), mask=is_in)


@triton.jit(do_not_specialize=["num_slots"])
def _parts_kernel(parts, grad, num_slots, BLOCKS: tl.constexpr, SLOTS: tl.constexpr):
    slot = tl.program_id(0).to(tl.int64) * SLOTS + tl.arange(0, SLOTS)
    is_slot = slot < num_slots
    total = tl.zeros([SLOTS], dtype=tl.float32)
    for block in range(BLOCKS):
        total += tl.load(parts + slot * BLOCKS + block, mask=is_slot, other=0.0)
    tl.store(grad + slot, total.to(grad.dtype.element_ty), mask=is_slot)
