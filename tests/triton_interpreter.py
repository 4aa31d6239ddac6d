"""Triton's interpreter put right where it is not what a GPU computes and the kernels count on it."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any


def correct_interpreter() -> None:
    """Widen every bfloat16 to the same number in float32: Triton 3.9 has others for those that are subnormal."""
    if find_spec("triton") is None:
        return
    import numpy as np
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    given = InterpreterBuilder.cast_impl

    def cast(self: Any, source: Any, to: Any) -> Any:
        if source.dtype.scalar == tl.bfloat16 and to.scalar == tl.float32:
            return TensorHandle((source.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
        return given(self, source, to)

    InterpreterBuilder.cast_impl = cast
