"""One safetensors file: its tensors as views of its mapping, or read into memory. Nothing is ever written to it."""

from __future__ import annotations

import json
import mmap
import os
import sys
import weakref
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

DTYPES = {
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I8": torch.int8,
}
# Pages are this process's own when they are written, and no memory is set aside for that: a file may be larger than it.
_NO_RESERVE = 0x4000 if sys.platform.startswith("linux") else 0


class StoredTensor(NamedTuple):
    """A tensor of a file: dtype by its safetensors name, and its bytes in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorFile:
    """An open file. ``tensors`` says what it holds."""

    def __init__(self, path: Path) -> None:
        """Open and check a file; a ``ValueError`` says what is wrong with it."""
        self.path = path
        try:
            with safe_open(path, framework="np"):  # checks the header, and the file's length against it
                pass
            self._fd = os.open(path, os.O_RDONLY)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"file {path} cannot be read as safetensors: {error}") from error
        self._close = weakref.finalize(self, os.close, self._fd)
        self._stamp = self._state()
        self._mapping: mmap.mmap | None = None
        self.tensors = self._header()

    def view(self, name: str) -> torch.Tensor:
        """Return a tensor as a view of the mapped file, whose pages are read when they are used.

        What is written to it stays in this process. A file that is cut short while it is mapped ends the process.
        """
        stored = self.tensors[name]
        dtype = DTYPES[stored.dtype]
        if self._mapping is None:
            self._mapping = mmap.mmap(
                self._fd, 0, flags=mmap.MAP_PRIVATE | _NO_RESERVE, prot=mmap.PROT_READ | mmap.PROT_WRITE
            )
        flat = torch.frombuffer(self._mapping, dtype=dtype, count=prod(stored.shape), offset=stored.begin)
        if flat.data_ptr() % dtype.itemsize:
            flat = flat.clone()  # kernels read whole elements
        return flat.view(stored.shape)

    def read_(self, name: str, out: torch.Tensor) -> None:
        """Overwrite ``out``, contiguous, on the CPU and of the tensor's shape and dtype, with a tensor."""
        stored = self.tensors[name]
        if self._state() != self._stamp:
            raise OSError(f"file {self.path} has changed since it was opened; expected it to stay as it was")
        buffer = out.view(-1).view(torch.uint8).numpy().data
        assert len(buffer) == stored.end - stored.begin, f"{name} has {stored.end - stored.begin} bytes"
        at = stored.begin
        while buffer:
            count = os.preadv(self._fd, [buffer], at)
            if not count:
                raise OSError(f"file {self.path} ended within {name}; expected {len(buffer)} bytes more")
            at, buffer = at + count, buffer[count:]

    def load_(self, name: str, out: torch.Tensor) -> None:
        """The same for ``out`` of any dtype, to which the tensor is cast."""
        dtype = DTYPES[self.tensors[name].dtype]
        if out.dtype == dtype:
            return self.read_(name, out)
        whole = torch.empty(out.shape, dtype=dtype)
        self.read_(name, whole)
        out.copy_(whole)

    def announce(self, name: str) -> None:
        """Let the system begin to read a tensor."""
        if hasattr(os, "posix_fadvise"):
            stored = self.tensors[name]
            os.posix_fadvise(self._fd, stored.begin, stored.end - stored.begin, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Close the file, as happens when nothing refers to it any more; views stay."""
        self._close()

    def _header(self) -> dict[str, StoredTensor]:
        begin = 8 + int.from_bytes(os.pread(self._fd, 8, 0), "little")
        header = json.loads(os.pread(self._fd, begin - 8, 8))
        return {
            name: StoredTensor(
                entry["dtype"],
                tuple(entry["shape"]),
                begin + entry["data_offsets"][0],
                begin + entry["data_offsets"][1],
            )
            for name, entry in header.items()
            if name != "__metadata__"
        }

    def _state(self) -> tuple[int, int]:
        status = os.fstat(self._fd)
        return status.st_size, status.st_mtime_ns
