"""Operations through ``torch.compile``: what is written down as the specification, made into few passes by inductor.

Written for eager torch, an operation joins passes by hand, slice by slice, with a backward of its own. A compiler wants
the opposite, plain formulas, and derives the backward itself. Rooms name what gains by it: ``docs/accelerators.md``.

Any number of tokens runs through one compiled function: only 0, 1 and more are different to the compiler. Everything
else, channels, dtypes, which inputs learn, is compiled once for each value it takes. torch gives up on a function that
was compiled too often, with an error, never by running it uncompiled.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any, ParamSpec, TypeVar, cast

import torch

_P = ParamSpec("_P")
_R = TypeVar("_R")


def compiled(function: Callable[_P, _R], *, channels: int) -> Callable[_P, _R]:
    """Return ``function`` as the compiler makes it, which is when it is first run.

    Of its first tensor all dimensions but the last ``channels`` count tokens; other tensors count the same in their
    first dimensions, or count none.
    """

    def run(*given: Any) -> Any:
        tokens = given[0].shape[: given[0].dim() - channels]
        fixed: list[object] = []
        for value in given:
            if isinstance(value, torch.Tensor):
                counts = value.dim() > 1 and value.shape[: len(tokens)] == tokens
                if counts:
                    torch._dynamo.maybe_mark_dynamic(value, [*range(len(tokens))])
                fixed.append((value.dtype, value.shape[len(tokens) :] if counts else value.shape))
            else:
                fixed.append(value)
        return _compiled(cast(FunctionType, function), tuple(fixed))(*given)

    return cast(Callable[_P, _R], run)


@cache
def _compiled(function: FunctionType, fixed: tuple[object, ...]) -> Callable[..., Any]:
    """What is compiled is counted by code, so the function for other channels is one with code of its own."""
    own = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    return torch.compile(own, fullgraph=True, dynamic=False)


@cache
def check_compiler(device_type: str) -> None:
    """Raise ``ValueError`` where ``torch.compile`` cannot make code for a device, which one small function tells."""

    def probe(x: torch.Tensor) -> torch.Tensor:
        return x * 2 + 1

    try:
        torch.compile(probe, fullgraph=True)(torch.ones(3, device=device_type))
    except RuntimeError as error:  # as all that dynamo and inductor raise
        raise ValueError(
            f"backend is 'compiled'; expected 'portable', or another: torch.compile does not work here for "
            f"{device_type}: {str(error).strip().splitlines()[0]}"
        ) from error
