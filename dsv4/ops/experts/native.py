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
from dsv4.ops.experts.coded import PackedMatrices
from dsv4.ops.experts.store import Addresses, ExpertStore, Matrices, Table, needed
from dsv4.ops.lowbit import round_rows
from dsv4.ops.lowbit.native import kind_of


def swiglu(gate: torch.Tensor, up: torch.Tensor, limit: float) -> torch.Tensor:
    """See ``dsv4.ops.experts.swiglu``."""
    if not native.serves(gate) or up.dtype != gate.dtype:
        return portable.swiglu(gate, up, limit)
    return _SwiGLU.apply(gate, up, limit)


def experts(
    x: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    w3: torch.Tensor,
    limit: float,
) -> torch.Tensor:
    """See ``dsv4.ops.experts``."""
    activation = _ACTIVATION if native.serves(x) else portable.ACTIVATION
    return portable.run(x, chosen, weights, w1, w2, w3, limit, activation)


def experts_in_order(
    x: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    w3: torch.Tensor,
    limit: float,
) -> torch.Tensor:
    """See ``dsv4.ops.experts``."""
    if not _is_fixed(x, weights, w1, w2, w3):
        return experts(x, chosen, weights, w1, w2, w3, limit)
    out = torch.empty(x.shape, dtype=torch.float32)
    _run(x, chosen, weights, (w1, w2, w3), None, limit, out)
    return out


def experts_with_shared(
    x: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    routed: Matrices,
    shared: Matrices,
    limit: float,
) -> torch.Tensor:
    """See ``dsv4.ops.experts.experts_with_shared``."""
    if _is_fixed(x, weights, *routed, *shared):
        out = torch.empty(x.shape, dtype=x.dtype)
        _run(x, chosen, weights, routed, shared, limit, out)
        return out
    return portable.join(experts(x, chosen, weights, *routed, limit), x, shared, limit, swiglu)


def experts_of_codes(
    x: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    routed: PackedMatrices,
    shared: PackedMatrices,
    limit: float,
) -> torch.Tensor:
    """See ``dsv4.ops.experts.experts_with_shared``: the kernel decodes as it multiplies."""
    if not native.serves(x) or not x.numel():
        return coded.experts_with_shared(x, chosen, weights, routed, shared, limit, "native")
    E, F, _ = routed[0].shape
    tables, scales = [], []
    for stack, one in zip(routed, shared, strict=True):
        for made, many, single in ((tables, stack.codes, one.codes), (scales, stack.scales, one.scales)):
            assert many.is_contiguous()
            assert single.is_contiguous()
            made.append(_addresses(many.data_ptr(), many.stride(0) * many.element_size(), E, single.data_ptr()))
    kinds, out = (kind_of(routed[0]), kind_of(shared[0])), torch.empty(x.shape, dtype=x.dtype)
    _call(round_rows(x, backend="native"), chosen, weights, tables, kinds, F, limit, out, scales)
    return out


def stored_experts(
    x: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    store: ExpertStore,
    limit: float,
    shared: Matrices | None,
) -> torch.Tensor:
    """See ``dsv4.ops.experts.stored_experts``."""
    if shared is None or not _is_fixed(x, weights, *shared) or not _has_kernel(store):
        activation = _ACTIVATION if native.serves(x) else portable.ACTIVATION
        routed = portable.run_stored(x, chosen, weights, store, limit, activation)
        return routed if shared is None else portable.join(routed, x, shared, limit, swiglu)
    shared = _in_one_piece(shared)
    if store.whole is not None:
        return _run_table(x, chosen, weights, store, store.whole, shared, limit)
    counts = needed(chosen, store.sizes[0])
    rows: torch.Tensor | None = None
    for table in store.tables(counts, len(x)):
        if len(table.matrices) == len(counts):
            return _run_table(x, chosen, weights, store, table, shared, limit)
        own = shared if rows is None else None  # once is enough
        if rows is None:
            rows = x.new_empty(x.shape[0], chosen.shape[1] + 1, x.shape[1])  # [T, A + 1, D]
        _call(x, chosen, weights, table.addresses(_pointers(own)), _dtypes(store, own), store.sizes[1], limit, rows)
    assert rows is not None, f"no table holds the experts {sorted(counts)}"
    total = torch.zeros(x.shape, dtype=torch.float32)
    for of_choice in rows.unbind(1):  # in the order of the kernel's own sum
        total += of_choice
    return total.to(x.dtype)


def _run_table(
    x: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    store: ExpertStore,
    table: Table,
    shared: Matrices,
    limit: float,
) -> torch.Tensor:
    """Run experts that are all here, as ``experts_with_shared`` does."""
    out = torch.empty(x.shape, dtype=x.dtype)
    _call(x, chosen, weights, table.addresses(_pointers(shared)), _dtypes(store, shared), store.sizes[1], limit, out)
    return out


def _is_fixed(x: torch.Tensor, weights: torch.Tensor, *matrices: torch.Tensor) -> bool:
    """Say whether the kernel takes these: no gradient to keep anything for, matrices of one dtype, and some tokens."""
    if native.wants_gradient(x, weights, *matrices) or not native.serves(x) or not x.numel():
        return False
    dtype = matrices[0].dtype
    return all(native.serves(w) and w.dtype == dtype for w in matrices)


def _has_kernel(store: ExpertStore) -> bool:
    return store.device.type == "cpu" and store.dtype in (torch.float32, torch.bfloat16)


def _run(
    x: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    routed: Matrices,
    shared: Matrices | None,
    limit: float,
    out: torch.Tensor,
) -> None:
    E, F, _ = routed[0].shape
    stacks, own = [_side_by_side(w) for w in routed], None if shared is None else _in_one_piece(shared)
    tables = [
        _addresses(w.data_ptr(), w.stride(0) * w.element_size(), E, pointer)
        for w, pointer in zip(stacks, _pointers(own), strict=True)
    ]
    _call(x, chosen, weights, tables, _dtypes(stacks[0], own), F, limit, out)


def _call(
    x: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    tables: Sequence[Addresses],
    kinds: tuple[int, int],
    expert_dim: int,
    limit: float,
    out: torch.Tensor,
    scales: Sequence[Addresses | None] = (None, None, None),
) -> None:
    """Run the kernel over tables of E addresses and one more. out: [T, D], or [T, A + 1, D] with the choices apart."""
    E, wrong = len(tables[0]) - 1, ctypes.c_long()
    native.call(
        "dsv4_experts", *chosen.shape, E, x.shape[1], expert_dim, native.is_bfloat16(x), *kinds,
        int(out.dim() == 3), torch.get_num_threads(), float(limit), x.contiguous(), chosen.contiguous(),
        weights.float().contiguous(), *tables, *scales, out, ctypes.pointer(wrong),
    )  # fmt: skip
    if wrong.value:
        lowest, highest = chosen.min().item(), chosen.max().item()
        raise ValueError(f"chosen holds {lowest} to {highest}; expected experts from 0 to {E - 1}")


def _in_one_piece(matrices: Matrices) -> Matrices:
    w1, w2, w3 = matrices
    return w1.contiguous(), w2.contiguous(), w3.contiguous()


def _pointers(shared: Matrices | None) -> tuple[int, int, int]:
    return (0, 0, 0) if shared is None else (shared[0].data_ptr(), shared[1].data_ptr(), shared[2].data_ptr())


def _dtypes(routed: torch.Tensor | ExpertStore, shared: Matrices | None) -> tuple[int, int]:
    """Whether the routed matrices are bfloat16, and the shared ones."""
    return int(routed.dtype == torch.bfloat16), 0 if shared is None else native.is_bfloat16(shared[0])


def _side_by_side(w: torch.Tensor) -> torch.Tensor:
    """w [E, ...], copied unless each expert's matrix lies in one piece."""
    return w if w.is_contiguous() or w[0].is_contiguous() else w.contiguous()


@lru_cache(maxsize=4096)  # three a layer, the same ones step after step
def _addresses(first: int, step: int, count: int, shared: int) -> Addresses:
    """The address of each expert's matrix, and last that of the shared one."""
    return (ctypes.c_void_p * (count + 1))(*(first + i * step for i in range(count)), shared)


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
