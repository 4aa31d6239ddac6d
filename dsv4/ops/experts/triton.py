"""Experts as grouped products: slots (token, choice) sorted by expert on the device, tiles of them by rows of a weight.

Forward is, after the sort, three kernels: gate and up together with the SwiGLU and the routing weight, the way back,
and each token's sum over its choices, in their order. The second kernel writes a slot's row where the slot is, so the
sum reads what lies together. Experts in codes are decoded as they are multiplied (``linear/triton_product.py``), and
their inputs are rounded by a kernel before each product. The shared expert is maps of all tokens: torch's, or in codes
those of ``linear``. Backward: ``triton_backward.py``.

A slot's sums are over all channels in the same steps, however many tokens there are, and nothing is added by atomics:
a token has the same bits alone and in a batch. No shape depends on what was chosen, so the host waits for nothing; a
choice that is no expert is not noticed, and leaves its row undefined. Float64 is ``portable``'s.
"""

# Kernels are a language of their own, in which a constexpr is a number and tensors are cut by None.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from dsv4.native import wants_gradient
from dsv4.ops.experts import coded, portable, rounded
from dsv4.ops.experts.store import Matrices
from dsv4.ops.experts.triton_backward import Kept, gradients, rows_rounded, sum_choices
from dsv4.ops.experts.triton_sort import Sorted, by_expert
from dsv4.ops.experts.triton_swiglu import activation, swiglu
from dsv4.ops.linear.triton import Rounded, of_codes
from dsv4.ops.linear.triton_product import (
    DTYPES,
    Coded,
    Config,
    as_read,
    config_of,
    matrix_of,
    products,
    rows_of_codes,
    tile_of,
)

__all__ = ["experts", "experts_with_shared", "rounded_experts", "swiglu"]

TOGETHER = 8  # tiles that take a block of a weight's rows one after another


def experts(
    x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, routed: Matrices, limit: float
) -> torch.Tensor:
    """See ``dsv4.ops.experts``."""
    if not _serves(x, routed):
        return portable.experts(x, chosen, weights, routed, limit)
    return _run(x, chosen, weights, routed, limit, rounds=False)


def rounded_experts(
    x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, routed: Matrices, limit: float
) -> torch.Tensor:
    """See ``dsv4.ops.experts.rounded_experts``."""
    if not _serves(x, routed):
        return rounded.rounded_experts(x, chosen, weights, routed, limit, "portable")
    return _run(x, chosen, weights, routed, limit, rounds=True)


def experts_with_shared(
    x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, routed: Matrices, shared: Matrices, limit: float
) -> torch.Tensor:
    """See ``dsv4.ops.experts.experts_with_shared``: the maps of the shared expert are torch's, or those of codes."""
    if routed.kind is None:
        return portable.join(experts(x, chosen, weights, routed, limit), x, shared, limit, swiglu)
    if x.dtype not in DTYPES:
        return coded.experts_with_shared(x, chosen, weights, routed, shared, limit, "portable")
    rows = Rounded(x)
    w1, w2, w3 = shared.weights
    gate, up = (of_codes(rows, w, False) for w in (w1, w3))
    own = of_codes(Rounded(swiglu(gate, up, limit)), w2, False)
    if not chosen.numel():
        return own
    stacks = tuple(as_read(w) for w in routed.weights)
    groups, config = _sorted(x, chosen, stacks[0])
    hidden, _, _ = gate_up(rows.of(stacks[0].kind, x.dtype), weights, stacks, groups, limit, config)
    y = back(rows_of_codes(hidden, stacks[1].kind), stacks[1], groups, config, *routed.shapes[1][1:])
    return sum_choices(y.view(*chosen.shape, -1), x.dtype, own)


def _serves(x: torch.Tensor, routed: Matrices) -> bool:
    return x.dtype in DTYPES and all(part.dtype in DTYPES for part in routed.parts)


def _run(
    x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, routed: Matrices, limit: float, *, rounds: bool
) -> torch.Tensor:
    keep = wants_gradient(x, weights, *routed.parts)
    return _Experts.apply(x, weights, *routed.parts, chosen, limit, rounds, keep)


def _sorted(x: torch.Tensor, chosen: torch.Tensor, stack: Coded) -> tuple[Sorted, Config]:
    E = len(stack.numbers)
    config = config_of(x.dtype, stack, chosen.numel() / E)
    return by_expert(chosen, E, config.tokens), config


class _Experts(torch.autograd.Function):
    """rounds: what goes into a map is rounded, tokens and hidden rows. Gradients pass straight through that."""

    @staticmethod
    def forward(ctx, x, weights, w1, w2, w3, chosen, limit, rounds, keep):
        x, ctx.limit, ctx.rounds, kept = x.contiguous(), limit, rounds, ()
        if not chosen.numel():
            total = x.new_zeros(x.shape, dtype=torch.float32)
        else:
            x = rows_rounded(x) if rounds else x
            stacks = tuple(as_read(w) for w in (w1, w2, w3))
            groups, config = _sorted(x, chosen, stacks[0])
            hidden, gate, up = gate_up(x, weights, stacks, groups, limit, config, keep=keep)
            kept = (gate, up, *groups)
            hidden = rows_rounded(hidden) if rounds else hidden
            y = back(hidden, stacks[1], groups, config, *w2.shape[1:])
            total = sum_choices(y.view(*chosen.shape, -1), torch.float32)
        if keep:
            ctx.save_for_backward(x, weights, w1, w2, w3, *kept)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weights, w1, w2, w3, *kept = ctx.saved_tensors
        if not kept:
            return *(torch.zeros_like(given) for given in (x, weights, w1, w2, w3)), None, None, None, None
        gate, up, *groups = kept
        found = Kept(x, weights, (w1, w2, w3), gate, up, Sorted(*groups), ctx.limit, ctx.rounds)
        return *gradients(grad, found, ctx.needs_input_grad), None, None, None, None


def gate_up(
    x: torch.Tensor,
    weights: torch.Tensor,
    stacks: tuple[Coded, ...],
    groups: Sorted,
    limit: float,
    config: Config,
    *,
    keep: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the weighted activation of each slot, [n, F] in the order of experts, and if kept its gate and its up.

    x: [T, D], by codes as ``rows_of_codes`` gives it.
    """
    w1, w2, w3 = stacks
    n, F, D, A = len(groups.slots), w1.numbers.shape[1], w2.numbers.shape[1], weights.shape[1]
    hidden = torch.empty(n, F, dtype=x.dtype, device=x.device)
    gate, up = (torch.empty_like(hidden) if keep else hidden for _ in range(2))
    tiles = len(groups.tile_expert)
    _gate_up_kernel[(tiles * triton.cdiv(F, config.rows),)](
        x, *groups, weights.contiguous(), w1.numbers, w3.numbers, w1.scales, w3.scales, hidden, gate, up, limit, tiles,
        x.shape[1], D, F, A, w1.kind, keep, TOGETHER, config.tokens, config.rows, config.step,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return hidden, gate, up


def back(hidden: torch.Tensor, w2: Coded, groups: Sorted, config: Config, D: int, F: int) -> torch.Tensor:
    """Return each slot's way back, [n, D] in the order of slots. hidden: [n, F] in the order of experts."""
    n, width = hidden.shape
    y = torch.empty(n, D, dtype=hidden.dtype, device=hidden.device)
    tiles = len(groups.tile_expert)
    _back_kernel[(tiles * triton.cdiv(D, config.rows),)](
        hidden, *groups, w2.numbers, w2.scales, y, tiles, width, D, F, w2.kind, TOGETHER,
        config.tokens, config.rows, config.step, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return y


@triton.jit(do_not_specialize=["num_tiles"])
def _gate_up_kernel(
    x, slots, starts, tile_expert, tile_first, weights, w1, w3, scales1, scales3, hidden, gate, up, limit, num_tiles,
    WIDTH: tl.constexpr, D: tl.constexpr, F: tl.constexpr, A: tl.constexpr, KIND: tl.constexpr, KEEP: tl.constexpr,
    TOGETHER: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    tile, block = tile_of(num_tiles, tl.cdiv(F, ROWS), TOGETHER)
    expert = tl.load(tile_expert + tile)
    if expert >= 0:
        place = tl.load(tile_first + tile) + tl.arange(0, TOKENS)
        is_slot = place < tl.load(starts + expert + 1)
        slot = tl.load(slots + place, mask=is_slot, other=0)  # past the last: what nobody keeps
        w1, scales1 = matrix_of(w1, scales1, expert, F, D, KIND)
        w3, scales3 = matrix_of(w3, scales3, expert, F, D, KIND)
        acc = tl.zeros([ROWS, TOKENS], dtype=tl.float32)
        acc, other = products(
            acc, acc, x, (slot // A).to(tl.int64) * WIDTH, w1, w3, scales1, scales3, block * ROWS, 0, tl.cdiv(D, STEP),
            F, D, KIND, False, True, ROWS, STEP,
        )  # fmt: skip
        # The activation is that of numbers in the dtype of x, which is what backward finds.
        of_gate = tl.trans(acc).to(x.dtype.element_ty)
        of_up = tl.trans(other).to(x.dtype.element_ty)
        row = block * ROWS + tl.arange(0, ROWS)
        at = place.to(tl.int64)[:, None] * F + row[None, :]
        is_in = is_slot[:, None] & (row < F)[None, :]
        if KEEP:
            tl.store(gate + at, of_gate, mask=is_in)
            tl.store(up + at, of_up, mask=is_in)
        weight = tl.load(weights + slot, mask=is_slot, other=0.0).to(tl.float32)
        made = activation(of_gate.to(tl.float32), of_up.to(tl.float32), limit) * weight[:, None]
        tl.store(hidden + at, made.to(hidden.dtype.element_ty), mask=is_in)


@triton.jit(do_not_specialize=["num_tiles"])
def _back_kernel(
    hidden, slots, starts, tile_expert, tile_first, w2, scales2, y, num_tiles,
    WIDTH: tl.constexpr, D: tl.constexpr, F: tl.constexpr, KIND: tl.constexpr,
    TOGETHER: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    tile, block = tile_of(num_tiles, tl.cdiv(D, ROWS), TOGETHER)
    expert = tl.load(tile_expert + tile)
    if expert >= 0:
        first = tl.load(tile_first + tile)
        place = first + tl.arange(0, TOKENS)
        is_slot = place < tl.load(starts + expert + 1)
        w2, scales2 = matrix_of(w2, scales2, expert, D, F, KIND)
        read = tl.where(is_slot, place, first).to(tl.int64) * WIDTH
        acc = tl.zeros([ROWS, TOKENS], dtype=tl.float32)
        acc, _ = products(
            acc,
            acc,
            hidden,
            read,
            w2,
            w2,
            scales2,
            scales2,
            block * ROWS,
            0,
            tl.cdiv(F, STEP),
            D,
            F,
            KIND,
            False,
            False,
            ROWS,
            STEP,
        )
        slot = tl.load(slots + place, mask=is_slot, other=0)
        row = block * ROWS + tl.arange(0, ROWS)
        at = slot.to(tl.int64)[:, None] * D + row[None, :]
        tl.store(y + at, tl.trans(acc).to(y.dtype.element_ty), mask=is_slot[:, None] & (row < D)[None, :])
