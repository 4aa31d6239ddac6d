"""Settings of the whole process, for commands that own one."""

from __future__ import annotations

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # glibc's mallopt parameters
NEVER = -1


def keep_freed_memory() -> bool:
    """Let the C library keep memory that torch frees, instead of returning it page by page.

    A step allocates and frees the same tensors every time; fetching them afresh from the kernel costs a page
    fault per 4 KiB, on virtual machines up to a third of a training step. The process then stays as large as it
    was at its largest. Returns whether it took effect: it is a setting of glibc, without meaning elsewhere.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, NEVER), (M_ARENA_MAX, 1))
    return all(library.mallopt(parameter, value) == 1 for parameter, value in settings)
