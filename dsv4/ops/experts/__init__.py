"""The feed-forward experts: clamped SwiGLU over the tokens routed to each (report 2.1 and 4.2.3).

    expert(x) = w2 . (silu(min(w1 x, limit)) * clip(w3 x, -limit, limit) * routing weight)

w1 is the gate, w3 the linear part, w2 the way back. The routing weight multiplies before w2, in float32.
"""

from __future__ import annotations

import torch

from dsv4.native import wants_gradient
from dsv4.ops.backend import Backend, pick, triton_kernel
from dsv4.ops.compiled import compiled
from dsv4.ops.experts import coded, native, portable, reference, rounded
from dsv4.ops.experts.store import CODES, ExpertStore, Matrices
from dsv4.ops.shapes import Shapes, check_integer

_WITH_SHARED = "experts.triton:experts_with_shared"


def swiglu(gate: torch.Tensor, up: torch.Tensor, limit: float, *, backend: Backend = "portable") -> torch.Tensor:
    """Return silu(min(gate, limit)) * clip(up, -limit, limit), computed in float32, in the dtype of gate.

    gate, up: [..., F].
    """
    if gate.shape != up.shape:
        raise ValueError(f"up has shape {list(up.shape)}; expected that of gate, {list(gate.shape)}")
    run = pick(
        backend,
        reference=reference.swiglu,
        portable=portable.swiglu,
        native=native.swiglu,
        compiled=compiled(reference.swiglu, channels=1),
        triton="experts.triton:swiglu",
    )
    return run(gate, up, limit)


def experts(
    x: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    routed: Matrices,
    limit: float,
    *,
    fixed_order: bool = False,
    backend: Backend = "portable",
) -> torch.Tensor:
    """Return the weighted sum of each token's experts, [T, D] float32.

    x: [T, D]; chosen: [T, A] int64, distinct in a row; weights: [T, A] float32; routed: stacks, w1 and w3 [E, F, D] and
    w2 [E, D, F], in any float dtype (cast to that of x). The caller adds the shared expert and rounds.
    fixed_order: each token by itself, where the backend is ``native`` and no gradient is asked for. With the Triton
    kernels each is in any case; they do not look whether ``chosen`` is in range.
    """
    _check(x, chosen, weights, routed)
    with_kernels = native.experts_in_order if fixed_order else native.experts
    run = pick(
        backend,
        reference=reference.experts,
        portable=portable.experts,
        native=with_kernels,
        triton="experts.triton:experts",
    )
    return run(x, chosen, weights, routed, limit)


def experts_with_shared(
    x: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    routed: Matrices,
    shared: Matrices,
    limit: float,
    *,
    backend: Backend = "portable",
) -> torch.Tensor:
    """Return the whole feed-forward layer, [T, D] in the dtype of x: ``experts``, plus the expert of every token.

    routed: as of ``experts``; shared: w1 and w3 [F, D] and w2 [D, F]. The shared expert's routing weight is 1; its
    result, rounded to the dtype of x, is added to the float32 sum of the others, and the whole rounded once.

    Both may be in codes, each of one kind. Then the inputs of all maps are rounded to E4M3, and no gradient passes.
    """
    if routed.kind is not None:
        _check_codes(x, chosen, weights, routed, shared)
        with torch.no_grad():
            if backend == "native":
                return native.experts_with_shared(x, chosen, weights, routed, shared, limit)
            kernel = triton_kernel(backend, _WITH_SHARED)
            if kernel is not None:
                return kernel(x, chosen, weights, routed, shared, limit)
            return coded.experts_with_shared(x, chosen, weights, routed, shared, limit, backend)
    _check(x, chosen, weights, routed, shared)
    run = pick(
        backend,
        reference=reference.experts_with_shared,
        portable=portable.experts_with_shared,
        native=native.experts_with_shared,
        triton=_WITH_SHARED,
    )
    return run(x, chosen, weights, routed, shared, limit)


def rounded_experts(
    x: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    routed: Matrices,
    limit: float,
    *,
    backend: Backend = "portable",
) -> torch.Tensor:
    """Return what ``experts`` does, with the inputs of every map rounded as released, [T, D] float32.

    routed: in the dtype of x, already rounded. Made for training: gradients pass straight through the rounding.
    """
    _check(x, chosen, weights, routed)
    kernel = triton_kernel(backend, "experts.triton:rounded_experts")
    if kernel is not None:
        return kernel(x, chosen, weights, routed, limit)
    return rounded.rounded_experts(x, chosen, weights, routed, limit, backend)


def stored_experts(
    x: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    store: ExpertStore,
    limit: float,
    *,
    shared: Matrices | None = None,
    backend: Backend = "portable",
) -> torch.Tensor:
    """Return what ``experts``, or with a shared expert ``experts_with_shared``, does with the experts of a store.

    No gradient passes. Each expert is asked for once, whatever the number of tokens, and a token's experts are added up
    in the order of its choices. With ``native`` and a shared expert that gives the same bits; elsewhere as far as
    torch's products do, whose last bits may depend on where in memory a matrix begins. shared: in codes if those of the
    store are.
    """
    _check_stored(x, chosen, weights, store, shared)
    if wants_gradient(x, weights, *(shared.parts if shared else ())):
        raise ValueError("x, weights or shared asks for a gradient; expected none: experts of a store give none")
    if x.device != store.device:
        raise ValueError(f"x is on {x.device}; expected {store.device}, where the store's experts are")
    if store.dtype == CODES and backend != "native":
        return coded.stored_experts(x, chosen, weights, store, limit, shared, backend)
    run = pick(
        backend,
        reference=reference.stored_experts,
        portable=portable.stored_experts,
        native=native.stored_experts,
    )
    return run(x, chosen, weights, store, limit, shared)


def _check_stored(
    x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, store: ExpertStore, shared: Matrices | None
) -> None:
    """Check the shapes, by comparing numbers where they fit, as ``_check`` does."""
    _, F, D = store.sizes
    if shared is not None and (shared.kind is not None) != (store.dtype == CODES):
        wanted = "codes" if store.dtype == CODES else "numbers"
        raise ValueError(f"shared is in {shared.kind or 'numbers'}; expected {wanted}, as the store has them")
    wanted = [[F, D], [D, F], [F, D]]
    found = wanted if shared is None else shared.shapes
    if x.dim() == chosen.dim() == 2 and chosen.dtype == torch.int64 and found == wanted:
        T, A = chosen.shape
        if x.shape == (T, D) and weights.shape == (T, A):
            return
    shapes = Shapes()
    shapes.check("x", x, "T D")
    shapes.check("chosen", chosen, "T A")
    shapes.check("weights", weights, "T A")
    check_integer("chosen", chosen)
    if x.shape[1] != D:
        raise ValueError(f"x has shape {list(x.shape)}; expected [T, D] with D = {D} (from the store)")
    raise ValueError(f"shared has shapes {found}; expected [F, D], [D, F] and [F, D] with F = {F} and D = {D}")


def _check_codes(
    x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, routed: Matrices, shared: Matrices
) -> None:
    """Check what is computed from codes."""
    if shared.kind is None:
        raise ValueError(f"shared is in numbers and routed in {routed.kind}; expected both in codes")
    found = [*routed.shapes, *shared.shapes]
    E, F, D = found[0]
    wanted = [[E, F, D], [E, D, F], [E, F, D], [F, D], [D, F], [F, D]]
    if found != wanted or list(chosen.shape) != list(weights.shape) or list(x.shape) != [len(chosen), D]:
        sizes = f"x {list(x.shape)}, chosen {list(chosen.shape)} and weights {list(weights.shape)}"
        raise ValueError(f"{sizes} do not fit matrices {found}; expected [T, D], [T, A], [T, A] and {wanted}")
    check_integer("chosen", chosen)


def _check(
    x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, routed: Matrices, shared: Matrices | None = None
) -> None:
    """Check the shapes, at the cost of comparing numbers where they fit: a decoding step has little else to do."""
    for name, matrices in (("routed", routed), ("shared", shared)):
        if matrices is not None and matrices.kind is not None:
            raise ValueError(f"{name} is in {matrices.kind}; expected numbers")
    own = () if shared is None else shared.parts
    if x.dim() == chosen.dim() == 2 and routed.parts[0].dim() == 3 and chosen.dtype == torch.int64:
        (T, D), A, (E, F, _) = x.shape, chosen.shape[1], routed.parts[0].shape
        wanted = (T, D), (T, A), (T, A), (E, F, D), (E, D, F), (E, F, D), (F, D), (D, F), (F, D)
        given = (x, chosen, weights, *routed.parts, *own)
        if all(tensor.shape == size for tensor, size in zip(given, wanted, strict=False)):
            return
    w1, w2, w3 = routed.parts
    shapes = Shapes()
    shapes.check("x", x, "T D")
    shapes.check("chosen", chosen, "T A")
    shapes.check("weights", weights, "T A")
    shapes.check("w1", w1, "E F D")
    shapes.check("w3", w3, "E F D")
    shapes.check("w2", w2, "E D F")
    for name, matrix, letters in zip(("w1", "w2", "w3"), own, ("F D", "D F", "F D"), strict=False):
        shapes.check(f"shared {name}", matrix, letters)
    check_integer("chosen", chosen)
