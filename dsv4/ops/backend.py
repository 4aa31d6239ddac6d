"""Choose an implementation by name. There is no fallback: a name that cannot run is an error.

``reference`` is the specification, ``portable`` plain torch for any device, ``native`` portable with C kernels where
an operation has them, for the CPU. ``auto``, a model's default, is the fastest of the last two that runs here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, ParamSpec, TypeVar, cast, get_args

import torch

from dsv4 import native as kernels

Backend = Literal["reference", "portable", "native"]
BackendChoice = Literal["auto", "reference", "portable", "native"]

_P = ParamSpec("_P")
_R = TypeVar("_R")


def check_backend(backend: str) -> None:
    """Raise ``ValueError`` unless ``backend`` names an implementation, or leaves the choice open."""
    if backend not in get_args(BackendChoice):
        raise ValueError(f"backend is {backend!r}; expected one of {', '.join(get_args(BackendChoice))}")


def resolve(choice: BackendChoice, device: torch.device) -> Backend:
    """Return the implementation that a choice stands for on a device."""
    if choice != "auto":
        return cast(Backend, choice)
    return "native" if device.type == "cpu" and kernels.available() else "portable"


def pick(
    backend: Backend,
    *,
    reference: Callable[_P, _R],
    portable: Callable[_P, _R],
    native: Callable[_P, _R] | None = None,
) -> Callable[_P, _R]:
    """Return the implementation that ``backend`` names; an operation without kernels has its portable one."""
    if backend not in get_args(Backend):
        raise ValueError(f"backend is {backend!r}; expected one of {', '.join(get_args(Backend))}")
    if backend == "reference":
        return reference
    return native if backend == "native" and native is not None else portable
