"""Write a file beside its destination and rename it, so no reader ever sees half of one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def write_then_rename(path: Path, write: Callable[[Path], None]) -> None:
    """Call ``write`` with a temporary path in the same directory, then move the result to ``path``."""
    if not path.parent.is_dir():
        raise ValueError(f"directory of {path.name} is {path.parent}; expected an existing directory")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
