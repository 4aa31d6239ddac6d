"""Measure what an operation holds: its largest tensor, and what autograd keeps for backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LargestTensor(TorchDispatchMode):
    """Record the size of the largest storage that any operation inside it returns, in elements.

    A view counts as what it is a view of, so that expanding or unfolding a small tensor is free.
    """

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, _stored_elements(value))
        return result


def largest_tensor(operation: Callable[[], torch.Tensor]) -> int:
    """Return the elements of the largest tensor formed by ``operation`` and the backward pass of its sum."""
    with LargestTensor() as largest:
        result = operation()
        if result.requires_grad:
            result.sum().backward()
    return largest.elements


def saved_elements(operation: Callable[[], torch.Tensor]) -> int:
    """Return how many elements autograd keeps for the backward pass of ``operation``, each storage once."""
    kept: dict[int, torch.Tensor] = {}

    def pack(value: torch.Tensor) -> torch.Tensor:
        kept[value.untyped_storage().data_ptr()] = value
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        result = operation()
    assert result.requires_grad
    return sum(_stored_elements(value) for value in kept.values())


def _stored_elements(value: torch.Tensor) -> int:
    return value.untyped_storage().nbytes() // value.element_size()
