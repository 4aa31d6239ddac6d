"""Weights and caches in pages of 2 MiB, where Linux gives them on request.

A step reads most of its bytes once, and in pages of 4 KiB the processor waits for addresses too
(``python bench/large_pages.py`` compares the two).
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable

import torch

_BYTES = 2**21
_MADV_HUGEPAGE = 14


def prefer_large_pages(tensors: Iterable[torch.Tensor]) -> int:
    """Ask that the memory of tensors be made of large pages, and return for how many bytes it was granted.

    To be called before anything is written to them: pages that are there already stay as they are. 0 elsewhere than on
    Linux, and where it does not know large pages.
    """
    if not sys.platform.startswith("linux"):
        return 0
    libc = ctypes.CDLL(None)
    granted = 0
    for begin, end in _ranges(tensors):
        begin, end = -(-begin // _BYTES) * _BYTES, end // _BYTES * _BYTES
        if begin < end and libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_HUGEPAGE) == 0:
            granted += end - begin
    return granted


def _ranges(tensors: Iterable[torch.Tensor]) -> list[tuple[int, int]]:
    """Where the tensors of the CPU lie: neighbours, a header of an allocation apart, as one."""
    storages = (tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu")
    merged: list[tuple[int, int]] = []
    for begin, size in sorted((storage.data_ptr(), storage.nbytes()) for storage in storages):
        if merged and begin - merged[-1][1] <= 4096:
            merged[-1] = merged[-1][0], max(merged[-1][1], begin + size)
        else:
            merged.append((begin, begin + size))
    return merged
