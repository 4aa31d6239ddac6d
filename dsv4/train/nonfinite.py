"""Say where a NaN or an infinity began, once a step has shown one. Runs only after the fact."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.utils._pytree import tree_leaves


class NonFiniteError(RuntimeError):
    """Loss or gradients are not finite. The step was not taken: weights and optimiser are as before it."""


def first_module(model: nn.Module, forward: Callable[[], object]) -> str | None:
    """Run ``forward`` again and name the first module that makes of finite inputs an output that is not.

    If it begins between modules, it is the first that passes it on; None if all outputs are finite.
    """
    makes: list[str] = []
    passes_on: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            if not makes and not _is_finite(output):
                (makes if _is_finite(inputs) else passes_on).append(name)

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return next(iter(makes + passes_on), None)


def _is_finite(tree: object) -> bool:
    tensors = [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor) and x.is_floating_point()]
    return all(bool(x.isfinite().all()) for x in tensors)


def last_parameter(model: nn.Module) -> str | None:
    """Name the last parameter, in the order of the layers, whose gradient is not finite: backward met it first."""
    wrong = [n for n, p in model.named_parameters() if p.grad is not None and not bool(p.grad.isfinite().all())]
    return wrong[-1] if wrong else None
