"""Experts over tokens grouped by expert: one matrix product an expert and weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from dsv4.ops.experts.store import ExpertStore, Matrices, needed, of_store

ROWS = 64  # an expert's group of many tokens is filled up to a multiple of this


def swiglu(gate: torch.Tensor, up: torch.Tensor, limit: float) -> torch.Tensor:
    """See ``dsv4.ops.experts.swiglu``."""
    return _SwiGLU.apply(gate, up, limit)


def experts(
    x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, routed: Matrices, limit: float
) -> torch.Tensor:
    """See ``dsv4.ops.experts``."""
    return run(x, chosen, weights, routed, limit, ACTIVATION)


def experts_with_shared(
    x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, routed: Matrices, shared: Matrices, limit: float
) -> torch.Tensor:
    """See ``dsv4.ops.experts.experts_with_shared``."""
    return join(experts(x, chosen, weights, routed, limit), x, shared, limit, swiglu)


def stored_experts(
    x: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    store: ExpertStore,
    limit: float,
    shared: Matrices | None,
) -> torch.Tensor:
    """See ``dsv4.ops.experts.stored_experts``."""
    routed = run_stored(x, chosen, weights, store, limit, ACTIVATION)
    return routed if shared is None else join(routed, x, shared, limit, swiglu)


def join(
    routed: torch.Tensor,
    x: torch.Tensor,
    shared: Matrices,
    limit: float,
    swiglu: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor],
) -> torch.Tensor:
    """Add the shared expert of x to the result of the routed ones, [T, D], and round once."""
    w1, w2, w3 = (w.to(x.dtype) for w in shared.parts)
    return (routed + F.linear(swiglu(F.linear(x, w1), F.linear(x, w3), limit), w2)).to(x.dtype)


class ActivationGrads(NamedTuple):
    """The weighted activation, and the gradients of gate, up [n, F] and of the weight [n]."""

    activated: torch.Tensor
    gate: torch.Tensor
    up: torch.Tensor
    weight: torch.Tensor


class Activation(NamedTuple):
    """The weighted SwiGLU of [n, F] rows in their dtype: forward, and backward forming it again."""

    forward: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]
    backward: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float], ActivationGrads]


def run(
    x: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    routed: Matrices,
    limit: float,
    activation: Activation,
) -> torch.Tensor:
    """Run the experts with this form of the activation."""
    groups = _group(chosen.flatten(), len(routed.parts[0]))
    return _Experts.apply(x, weights, *routed.parts, groups, limit, activation)


@torch.no_grad()
def run_stored(
    x: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    store: ExpertStore,
    limit: float,
    activation: Activation,
) -> torch.Tensor:
    """The same over the tables of a store, without a gradient: the same products, in the order of the tables."""
    E, F_, _ = store.sizes
    counts = needed(chosen, E)
    groups = _group(chosen.flatten(), E)
    slots, spans = _gather(x, weights, groups, F_), dict(groups.spans)
    for expert, matrices in of_store(store, counts, len(x)):
        _run_expert(slots, spans[expert], matrices.parts, limit, activation)
    return _sum_choices(slots.y, groups.places, weights.shape[1], slots.weight.dtype)


class _Groups(NamedTuple):
    """Slots (token, choice) grouped by expert, each group filled up to a whole number of rows.

    slots: [n] the slot of each row; fillers hold the number one past the last slot, and read zeros.
    places: [T * A] the row of each slot. spans: each used expert with its rows.
    """

    slots: torch.Tensor
    places: torch.Tensor
    spans: list[tuple[int, slice]]


def _group(chosen: torch.Tensor, num_experts: int) -> _Groups:
    """Group slots by chosen expert, [T * A] int64.

    With whole groups the matrix products come in few sizes, for which the library keeps its plans: planning
    a new size costs more than the rows it saves.
    """
    num_slots = chosen.shape[0]
    whole = ROWS if num_slots >= ROWS * num_experts else 1
    counts = torch.bincount(chosen, minlength=num_experts)
    filled = (counts + whole - 1) // whole * whole
    grouped = chosen.argsort(stable=True)
    shift = (filled.cumsum(0) - filled) - (counts.cumsum(0) - counts)  # fillers before each expert's group
    row = torch.arange(num_slots, device=chosen.device) + shift[chosen[grouped]]
    sizes = filled.tolist()
    slots = grouped.new_full((sum(sizes),), num_slots).index_copy_(0, row, grouped)
    places = torch.empty_like(grouped).index_copy_(0, grouped, row)
    spans, start = [], 0
    for expert, size in enumerate(sizes):
        if size:
            spans.append((expert, slice(start, start + size)))
        start += size
    return _Groups(slots, places, spans)


class _Slots(NamedTuple):
    """Grouped slots on their way: x and y, before and after, [slots, D], gate and up [slots, F], weight [slots]."""

    x: torch.Tensor
    weight: torch.Tensor
    gate: torch.Tensor
    up: torch.Tensor
    y: torch.Tensor


def _gather(x: torch.Tensor, weights: torch.Tensor, groups: _Groups, expert_dim: int) -> _Slots:
    wide = torch.promote_types(x.dtype, torch.float32)
    weight = _with_zero(weights.flatten().to(wide))[groups.slots]
    rows = _with_zero(x)[groups.slots // weights.shape[1]]  # [slots, D]
    gate, up = (x.new_empty(len(rows), expert_dim) for _ in range(2))
    return _Slots(rows, weight, gate, up, torch.empty_like(rows))


def _run_expert(
    slots: _Slots, now: slice, matrices: tuple[torch.Tensor, ...], limit: float, activation: Activation
) -> None:
    """Fill in gate, up and y of one expert's rows."""
    rows, gate, up = slots.x[now], slots.gate[now], slots.up[now]
    w1, w2, w3 = (w.to(rows.dtype).T for w in matrices)
    torch.mm(rows, w1, out=gate)
    torch.mm(rows, w3, out=up)
    torch.mm(activation.forward(gate, up, slots.weight[now], limit), w2, out=slots.y[now])


def _activate(gate: torch.Tensor, up: torch.Tensor, limit: float) -> torch.Tensor:
    """The clamped SwiGLU in at least float32."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    return F.silu(gate.to(wide).clamp(max=limit)).mul_(up.to(wide).clamp(-limit, limit))


def _activate_again(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, weight: torch.Tensor | float, limit: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The activation, wide and without its weight, and the gradients of gate and up through both.

    grad: [n, F] wide, of the weighted activation. Nothing passes beyond a clamp's limit.
    """
    wide_gate, wide_up = gate.to(grad.dtype), up.to(grad.dtype)
    g, v = wide_gate.clamp(max=limit), wide_up.clamp(-limit, limit)
    silu = F.silu(g)
    activated = silu * v
    weighted = grad * weight
    grad_up = _clamp_backward(silu.mul_(weighted), wide_up, -limit, limit)
    grad_gate = torch.ops.aten.silu_backward(v.mul_(weighted), g)
    grad_gate = _clamp_backward(grad_gate, wide_gate, -torch.inf, limit)
    return activated, grad_gate.to(gate.dtype), grad_up.to(up.dtype)


def _weighted(gate: torch.Tensor, up: torch.Tensor, weight: torch.Tensor, limit: float) -> torch.Tensor:
    return _activate(gate, up, limit).mul_(weight[:, None]).to(gate.dtype)


def _weighted_backward(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, weight: torch.Tensor, limit: float
) -> ActivationGrads:
    grad = grad.to(weight.dtype)
    activated, grad_gate, grad_up = _activate_again(grad, gate, up, weight[:, None], limit)
    grad_weight = torch.linalg.vecdot(grad, activated)
    return ActivationGrads(activated.mul_(weight[:, None]).to(gate.dtype), grad_gate, grad_up, grad_weight)


ACTIVATION = Activation(_weighted, _weighted_backward)


def _clamp_backward(grad: torch.Tensor, x: torch.Tensor, lowest: float, highest: float) -> torch.Tensor:
    """The gradient where lowest <= x <= highest, else 0: one pass, where a mask takes three.

    The operation excludes its bounds, so they are moved out by one place of the dtype.
    """
    step = torch.finfo(grad.dtype).eps
    return torch.ops.aten.hardtanh_backward(grad, x, lowest * (1 + step), highest * (1 + step))


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, limit):
        ctx.save_for_backward(gate, up)
        ctx.limit = limit
        return _activate(gate, up, limit).to(gate.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        wide = torch.promote_types(gate.dtype, torch.float32)
        _, grad_gate, grad_up = _activate_again(grad.to(wide), gate, up, 1.0, ctx.limit)
        return grad_gate, grad_up, None


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weights, w1, w2, w3, groups, limit, activation):
        slots = _gather(x, weights, groups, w1.shape[1])
        for expert, now in groups.spans:
            _run_expert(slots, now, (w1[expert], w2[expert], w3[expert]), limit, activation)
        ctx.save_for_backward(x, weights, w1, w2, w3, slots.gate, slots.up)
        ctx.groups, ctx.limit, ctx.activation = groups, limit, activation
        return _sum_choices(slots.y, groups.places, weights.shape[1], slots.weight.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weights, w1, w2, w3, gate, up = ctx.saved_tensors
        groups, wide, dtype = ctx.groups, grad.dtype, x.dtype
        token = groups.slots // weights.shape[1]
        weight = _with_zero(weights.flatten().to(wide))[groups.slots]
        rows, grad_rows = _with_zero(x)[token], _with_zero(grad.to(dtype))[token]  # [slots, D]
        grad_weight = grad.new_empty(len(rows))
        grad_w1, grad_w2, grad_w3 = (torch.zeros_like(w) for w in (w1, w2, w3))
        for expert, now in groups.spans:
            grad_hidden = torch.mm(grad_rows[now], w2[expert].to(dtype))
            inner = ctx.activation.backward(grad_hidden, gate[now], up[now], weight[now], ctx.limit)
            grad_weight[now] = inner.weight
            grad_w2[expert] = torch.mm(grad_rows[now].T, inner.activated)
            grad_w1[expert] = torch.mm(inner.gate.T, rows[now])
            grad_w3[expert] = torch.mm(inner.up.T, rows[now])
            # This expert's gradient rows are used up: they give their place to the gradient of its inputs.
            torch.mm(inner.gate, w1[expert].to(dtype), out=grad_rows[now])
            grad_rows[now].addmm_(inner.up, w3[expert].to(dtype))
        grad_x = _sum_choices(grad_rows, groups.places, weights.shape[1], wide).to(dtype)
        grad_weights = grad_weight[groups.places].view(weights.shape).to(weights.dtype)
        return grad_x, grad_weights, grad_w1, grad_w2, grad_w3, None, None, None


def _sum_choices(y: torch.Tensor, places: torch.Tensor, num_choices: int, dtype: torch.dtype) -> torch.Tensor:
    """Add up each token's rows of y [slots, D], in the order of its choices: [T, D]."""
    by_choice = places.view(-1, num_choices).T.contiguous()  # [A, T]
    total = y.index_select(0, by_choice[0]).to(dtype)
    for rows in by_choice[1:]:
        total += y.index_select(0, rows)
    return total


def _with_zero(x: torch.Tensor) -> torch.Tensor:
    """Append a row of zeros, the one that fillers read."""
    return torch.cat([x, x.new_zeros(1, *x.shape[1:])])
