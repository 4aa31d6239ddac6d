"""Choose an implementation by name. There is no fallback: a name that cannot run is an error.

``reference`` is the specification, ``portable`` plain torch for any device, ``native`` portable with C kernels where
an operation has them, for the CPU, ``compiled`` portable with what gains by ``torch.compile`` put through it,
``triton`` portable with the Triton kernels that were proved on a GPU (``proved.json``), and ``unproved`` with all of
them, which is for proving them. ``auto``, a model's default, is ``native`` on a CPU and ``triton`` on an accelerator,
where they can be had, and ``portable`` otherwise.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar, cast, get_args

import torch

from dsv4 import native as kernels
from dsv4.ops.compiled import check_compiler

Backend = Literal["reference", "portable", "native", "compiled", "triton", "unproved"]
BackendChoice = Literal["auto", "reference", "portable", "native", "compiled", "triton", "unproved"]

PROVED = Path(__file__).with_name("proved.json")
"""Kernels, as ``module:function`` below ``dsv4.ops``, and on what and when their numerics were proved; ``make gpu``."""

_P = ParamSpec("_P")
_R = TypeVar("_R")


def check_backend(backend: str) -> None:
    """Raise ``ValueError`` unless ``backend`` names an implementation, or leaves the choice open."""
    if backend not in get_args(BackendChoice):
        raise ValueError(f"backend is {backend!r}; expected one of {', '.join(get_args(BackendChoice))}")


def resolve(choice: BackendChoice, device: torch.device) -> Backend:
    """Return the implementation that a choice stands for on a device; ``ValueError`` if that cannot run there."""
    if choice == "compiled":
        check_compiler(device.type)
    if choice != "auto":
        return cast(Backend, choice)
    if device.type == "cpu":
        return "native" if kernels.available() else "portable"
    return "triton" if proved() and find_spec("triton") is not None else "portable"


def pick(
    backend: Backend,
    *,
    reference: Callable[_P, _R],
    portable: Callable[_P, _R],
    native: Callable[_P, _R] | None = None,
    compiled: Callable[_P, _R] | None = None,
    triton: str | None = None,
) -> Callable[_P, _R]:
    """Return the implementation that ``backend`` names; an operation without kernels has its portable one.

    compiled: of ``dsv4.ops.compiled``, where that was seen to be faster. triton: where its Triton kernel is,
    ``module:function`` below ``dsv4.ops``, imported when it is first wanted.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend is {backend!r}; expected one of {', '.join(get_args(Backend))}")
    if backend == "reference":
        return reference
    if triton is not None and (kernel := triton_kernel(backend, triton)) is not None:
        return kernel
    own = {"native": native, "compiled": compiled}.get(backend)
    return portable if own is None else own


def triton_kernel(backend: Backend, name: str) -> Callable[..., Any] | None:
    """Return the Triton kernel ``module:function`` if this backend takes it, else None."""
    return _load(name) if backend == "unproved" or (backend == "triton" and name in proved()) else None


@cache
def proved() -> dict[str, Any]:
    """The kernels that were proved on a GPU, by name."""
    return json.loads(PROVED.read_text(encoding="utf-8"))


@cache
def _load(name: str) -> Callable[..., Any]:
    # Products may be added without being rounded, as C kernels do it; Triton wants to be told.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    module, function = name.split(":")
    return getattr(import_module(f"dsv4.ops.{module}"), function)
