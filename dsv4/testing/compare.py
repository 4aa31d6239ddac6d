"""Run an operation forward and backward, and compare two runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.utils._pytree import tree_leaves

COTANGENT_SEED = 20


def evaluate(operation: Callable, **inputs: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Return the tensors of ``operation(**inputs)`` and the gradient of each floating-point input.

    The gradients are those of a fixed random combination of the outputs that carry one, zeros for an input
    on which these do not depend. If no output carries a gradient there are none.
    """
    leaves = {name: _leaf(value) for name, value in inputs.items()}
    outputs = [value for value in tree_leaves(operation(**leaves)) if isinstance(value, torch.Tensor)]
    results = {f"output {i}": value.detach() for i, value in enumerate(outputs)}
    roots = [value for value in outputs if value.requires_grad]
    wanted = {name: leaf for name, leaf in leaves.items() if leaf is not None and leaf.requires_grad}
    if roots and wanted:
        grads = torch.autograd.grad(roots, list(wanted.values()), cotangents(roots), materialize_grads=True)
        results |= {f"gradient of {name}": grad for name, grad in zip(wanted, grads, strict=True)}
    return results


def cotangents(outputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return fixed random gradients for these outputs."""
    generator = torch.Generator().manual_seed(COTANGENT_SEED)
    return [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in outputs]


def assert_close(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float = 1e-12) -> None:
    """Raise ``AssertionError`` unless each tensor agrees, relative to its largest finite element (at least 1)."""
    assert got.keys() == wanted.keys()
    for name, expected in wanted.items():
        finite = expected[expected.isfinite()].abs()
        scale = max(1.0, float(finite.max())) if finite.numel() else 1.0
        allowed = tolerance * scale if expected.dtype.is_floating_point else 0
        torch.testing.assert_close(
            got[name], expected, rtol=0, atol=allowed, msg=lambda text, name=name: f"{name}: {text}"
        )


def assert_backends_agree(operation: Callable, tolerance: float = 1e-12, **inputs: torch.Tensor | None) -> None:
    """Hold ``operation(backend="portable")`` to the reference, in values and gradients."""

    def run(backend: str) -> dict[str, torch.Tensor]:
        return evaluate(lambda **leaves: operation(backend=backend, **leaves), **inputs)

    assert_close(run("portable"), run("reference"), tolerance)


def assert_repeatable(operation: Callable, **inputs: torch.Tensor | None) -> None:
    """Raise ``AssertionError`` unless two runs give the same bits, forward and backward."""
    first, second = evaluate(operation, **inputs), evaluate(operation, **inputs)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), f"{name} differs between two runs"


def relative_distance(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return the norm of the difference over the norm of ``wanted``."""
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def _leaf(value: torch.Tensor | None) -> torch.Tensor | None:
    if value is None or not value.dtype.is_floating_point:
        return value
    return value.detach().requires_grad_()


def assert_kernels_agree(operation: Callable, dtypes: Sequence[torch.dtype], **inputs: torch.Tensor | None) -> None:
    """Hold ``operation(backend="native")`` to the reference in float64, within twice the portable path's distance.

    inputs are float32; those named ``streams``, ``y``, ``x``, ``gate`` and ``up`` take each of ``dtypes`` in turn, as
    activations do. The kernels must have run: a float64 input would go to the portable path.
    """
    activations = {"streams", "y", "x", "gate", "up"} & inputs.keys()
    for dtype in dtypes:
        now = {n: v.to(dtype) if n in activations and v is not None else v for n, v in inputs.items()}
        exact = {n: v.double() if v is not None and v.is_floating_point() else v for n, v in now.items()}
        wanted = evaluate(lambda **leaves: operation(backend="reference", **leaves), **exact)
        portable, kernels = (
            evaluate(lambda backend=backend, **leaves: operation(backend=backend, **leaves), **now)
            for backend in ("portable", "native")
        )
        assert kernels.keys() == wanted.keys()
        for name, expected in wanted.items():
            assert kernels[name].dtype == portable[name].dtype, name
            allowed = 2 * (portable[name].double() - expected).norm() + 1e-6 * (1 + expected.norm())
            assert (kernels[name].double() - expected).norm() <= allowed, f"{name} in {dtype}"
