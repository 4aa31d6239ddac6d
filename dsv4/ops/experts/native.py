"""SwiGLU on the CPU as one C kernel (``native/swiglu.c``), alone and inside the experts.

In a fixed order, and where no gradient is asked for, the experts are one kernel as a whole (``native/experts.c``): a
token's bits do not depend on the tokens beside it, nor on the number of threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch.autograd.function import once_differentiable

from dsv4 import native
from dsv4.ops.experts import coded, portable
from dsv4.ops.experts.store import CODES, Addresses, ExpertStore, Matrices, Table, needed
from dsv4.ops.lowbit import Packed, round_rows
from dsv4.ops.lowbit.native import kind_of

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, CODES)


def swiglu(gate: torch.Tensor, up: torch.Tensor, limit: float) -> torch.Tensor:
    """See ``dsv4.ops.experts.swiglu``."""
    if not native.serves(gate) or up.dtype != gate.dtype:
        return portable.swiglu(gate, up, limit)
    return _SwiGLU.apply(gate, up, limit)


def experts(
    x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, routed: Matrices, limit: float
) -> torch.Tensor:
    """See ``dsv4.ops.experts``."""
    return portable.run(x, chosen, weights, routed, limit, _activation(x))


def experts_in_order(
    x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, routed: Matrices, limit: float
) -> torch.Tensor:
    """See ``dsv4.ops.experts``."""
    if not _is_fixed(x, weights, routed):
        return experts(x, chosen, weights, routed, limit)
    out = torch.empty(x.shape, dtype=torch.float32)
    return _run(x, chosen, weights, routed, None, limit, out)


def experts_with_shared(
    x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, routed: Matrices, shared: Matrices, limit: float
) -> torch.Tensor:
    """See ``dsv4.ops.experts.experts_with_shared``: the kernel decodes codes as it multiplies."""
    if _is_fixed(x, weights, routed, shared):
        return _run(x, chosen, weights, routed, shared, limit, torch.empty(x.shape, dtype=x.dtype))
    if routed.kind is not None:
        return coded.experts_with_shared(x, chosen, weights, routed, shared, limit, "native")
    return portable.join(experts(x, chosen, weights, routed, limit), x, shared, limit, swiglu)


def stored_experts(
    x: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    store: ExpertStore,
    limit: float,
    shared: Matrices | None,
) -> torch.Tensor:
    """See ``dsv4.ops.experts.stored_experts``."""
    if shared is not None and store.dtype in _KERNEL_DTYPES and _is_fixed(x, weights, shared):
        return _run_stored(x, chosen, weights, store, shared, limit)
    if store.dtype == CODES:
        return coded.stored_experts(x, chosen, weights, store, limit, shared, "native")
    routed = portable.run_stored(x, chosen, weights, store, limit, _activation(x))
    return routed if shared is None else portable.join(routed, x, shared, limit, swiglu)


def _run_stored(
    x: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    store: ExpertStore,
    shared: Matrices,
    limit: float,
) -> torch.Tensor:
    """Run the kernel over a store, at once or in passes, as ``_run`` does over stacks."""
    x, own, F = _as_read(x, shared), _in_one_piece(shared), store.sizes[1]
    if store.whole is not None:
        return _run_table(x, chosen, weights, store.whole, own, F, limit, torch.empty(x.shape, dtype=x.dtype))
    counts = needed(chosen, store.sizes[0])
    rows: torch.Tensor | None = None
    for table in store.tables(counts, len(x)):
        if len(table.matrices) == len(counts):
            return _run_table(x, chosen, weights, table, own, F, limit, torch.empty(x.shape, dtype=x.dtype))
        once = own if rows is None else None
        if rows is None:
            rows = x.new_empty(x.shape[0], chosen.shape[1] + 1, x.shape[1])  # [T, A + 1, D]
        _run_table(x, chosen, weights, table, once, F, limit, rows)
    assert rows is not None, f"no table holds the experts {sorted(counts)}"
    total = torch.zeros(x.shape, dtype=torch.float32)
    for of_choice in rows.unbind(1):  # in the order of the kernel's own sum
        total += of_choice
    return total.to(x.dtype)


def _run_table(
    x: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    table: Table,
    shared: Matrices | None,
    expert_dim: int,
    limit: float,
    out: torch.Tensor,
) -> torch.Tensor:
    """Run the kernel over the experts that are here, and return ``out``. x: as ``_as_read`` returns it."""
    one = table.any
    tables = table.addresses(_pointers(shared, len(one.parts)))
    return _call(x, chosen, weights, tables, (_kind(one), _kind(shared)), expert_dim, limit, out)


def _run(
    x: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    routed: Matrices,
    shared: Matrices | None,
    limit: float,
    out: torch.Tensor,
) -> torch.Tensor:
    """Run the kernel over stacks, and return ``out``."""
    x = _as_read(x, routed)
    stacks, own = [_side_by_side(w) for w in routed.parts], None if shared is None else _in_one_piece(shared)
    E, F = stacks[0].shape[:2]
    tables = [
        _addresses(w.data_ptr(), w.stride(0) * w.element_size(), E, pointer)
        for w, pointer in zip(stacks, _pointers(own, len(stacks)), strict=True)
    ]
    return _call(x, chosen, weights, tables, (_kind(routed), _kind(own)), F, limit, out)


def _call(
    x: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    tables: Sequence[Addresses],
    kinds: tuple[int, int],
    expert_dim: int,
    limit: float,
    out: torch.Tensor,
) -> torch.Tensor:
    """Run the kernel over tables of E addresses and one more. out: [T, D], or [T, A + 1, D] with the choices apart."""
    E, wrong = len(tables[0]) - 1, ctypes.c_long()
    all_tables = (*tables, None, None, None)[:6]  # numbers have no scales
    native.call(
        "dsv4_experts", *chosen.shape, E, x.shape[1], expert_dim, native.is_bfloat16(x), *kinds,
        int(out.dim() == 3), torch.get_num_threads(), float(limit), x.contiguous(), chosen.contiguous(),
        weights.float().contiguous(), *all_tables, out, ctypes.pointer(wrong),
    )  # fmt: skip
    if wrong.value:
        lowest, highest = chosen.min().item(), chosen.max().item()
        raise ValueError(f"chosen holds {lowest} to {highest}; expected experts from 0 to {E - 1}")
    return out


def _is_fixed(x: torch.Tensor, weights: torch.Tensor, *matrices: Matrices) -> bool:
    """Say whether the kernel takes these: some tokens, no gradient to keep anything for, and matrices of one dtype.

    Or in codes, through which no gradient passes.
    """
    if not native.serves(x) or not x.numel():
        return False
    if matrices[0].kind is not None:
        return True
    parts = [part for each in matrices for part in each.parts]
    is_alike = all(native.serves(w) and w.dtype == parts[0].dtype for w in parts)
    return is_alike and not native.wants_gradient(x, weights, *parts)


def _as_read(x: torch.Tensor, matrices: Matrices) -> torch.Tensor:
    """x as the kernel multiplies it by these: rounded for codes."""
    return x if matrices.kind is None else round_rows(x, backend="native")


def _in_one_piece(matrices: Matrices) -> Matrices:
    return Matrices(tuple(part.contiguous() for part in matrices.parts), matrices.kind)


def _pointers(shared: Matrices | None, count: int) -> tuple[int, ...]:
    """Where the parts of the shared expert are, null where it is left out."""
    return (0,) * count if shared is None else tuple(part.data_ptr() for part in shared.parts)


def _kind(matrices: Matrices | None) -> int:
    """By which the kernel knows a dtype or kind of codes."""
    if matrices is None:
        return 0
    weight = matrices.weights[0]
    return kind_of(weight) if isinstance(weight, Packed) else native.is_bfloat16(weight)


def _side_by_side(w: torch.Tensor) -> torch.Tensor:
    """w [E, ...], copied unless each expert's matrix lies in one piece."""
    return w if w.is_contiguous() or w[0].is_contiguous() else w.contiguous()


@lru_cache(maxsize=4096)  # of each part of a layer, the same ones step after step
def _addresses(first: int, step: int, count: int, shared: int) -> Addresses:
    """The address of each expert's matrix, and last that of the shared one."""
    return (ctypes.c_void_p * (count + 1))(*(first + i * step for i in range(count)), shared)


def _activation(x: torch.Tensor) -> portable.Activation:
    return _ACTIVATION if native.serves(x) else portable.ACTIVATION


def _activate(gate: torch.Tensor, up: torch.Tensor, weight: torch.Tensor | None, limit: float) -> torch.Tensor:
    gate, up, out = gate.contiguous(), up.contiguous(), torch.empty_like(gate, memory_format=torch.contiguous_format)
    native.call("dsv4_swiglu", *_sizes(gate), gate, up, weight, limit, out)
    return out


def _activate_backward(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, weight: torch.Tensor, limit: float
) -> portable.ActivationGrads:
    activated, grad_gate, grad_up = (torch.empty_like(gate) for _ in range(3))
    grads = portable.ActivationGrads(activated, grad_gate, grad_up, torch.empty_like(weight))
    native.call("dsv4_swiglu_backward", *_sizes(gate), gate, up, weight, limit, grad, *grads)
    return grads


def _sizes(gate: torch.Tensor) -> tuple[int, ...]:
    F = gate.shape[-1]
    return gate.numel() // F, F, native.is_bfloat16(gate), torch.get_num_threads()


_ACTIVATION = portable.Activation(_activate, _activate_backward)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, limit):
        ctx.save_for_backward(gate, up)
        ctx.limit = limit
        return _activate(gate, up, None, limit)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gate, up = (x.contiguous() for x in ctx.saved_tensors)
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        native.call(
            "dsv4_swiglu_backward", *_sizes(gate), gate, up, None, ctx.limit,
            grad.to(gate.dtype).contiguous(), None, grad_gate, grad_up, None,
        )  # fmt: skip
        return grad_gate, grad_up, None
