"""Settings of the whole process, for commands that own one."""

from __future__ import annotations

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # glibc's mallopt parameters
LARGEST_ON_HEAP = 32 << 20  # bytes; the most glibc accepts as mmap threshold
KEPT = 2_000_000_000  # bytes of freed memory kept before any goes back


def keep_freed_memory() -> bool:
    """Let the C library keep memory that torch frees, instead of returning it page by page.

    A step allocates and frees the same tensors every time; fetching them afresh from the kernel costs a page
    fault per 4 KiB, on virtual machines up to a third of a training step. Returns whether it took effect: it is
    a setting of glibc, without meaning elsewhere.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    settings = ((M_MMAP_THRESHOLD, LARGEST_ON_HEAP), (M_TRIM_THRESHOLD, KEPT), (M_ARENA_MAX, 1))
    return all(library.mallopt(parameter, value) == 1 for parameter, value in settings)
