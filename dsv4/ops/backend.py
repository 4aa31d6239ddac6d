"""Choose an implementation by name. There is no fallback: a name that cannot run is an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, ParamSpec, TypeVar, get_args

Backend = Literal["reference", "portable"]

_P = ParamSpec("_P")
_R = TypeVar("_R")


def check_backend(backend: str) -> None:
    """Raise ``ValueError`` unless ``backend`` names an implementation."""
    if backend not in get_args(Backend):
        raise ValueError(f"backend is {backend!r}; expected one of {', '.join(get_args(Backend))}")


def pick(backend: Backend, *, reference: Callable[_P, _R], portable: Callable[_P, _R]) -> Callable[_P, _R]:
    """Return the implementation that ``backend`` names."""
    check_backend(backend)
    return reference if backend == "reference" else portable
