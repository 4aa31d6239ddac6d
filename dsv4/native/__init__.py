"""Kernels in C for the CPU, compiled on first use by the machine's own compiler.

They replace passes over memory that plain torch makes one by one. A library is kept in the user's cache, named by
the hash of its sources, flags, compiler and processor, so that another machine or a new version never runs an old one.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch._C._autograd import _profiler_enabled
from torch.profiler import record_function

SOURCES = Path(__file__).parent
FLAGS = (
    "-O3",
    "-march=native",
    "-mprefer-vector-width=512" if platform.machine() in ("x86_64", "AMD64") else "",
    "-fopenmp" if sys.platform.startswith("linux") else "",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-shared",
    "-fPIC",
)


class Recorder(Protocol):
    """Something that holds the calls of kernels as they are made."""

    def add(self, run: Callable[..., object], arguments: Sequence[Any], keeps: Sequence[Any]) -> None: ...


class _Recorders(threading.local):
    """Those that record now, each the calls of its own thread."""

    def __init__(self) -> None:
        self.now: list[Recorder] = []


recorders = _Recorders()


class BuildError(RuntimeError):
    """The kernels could not be compiled here."""


@cache
def library() -> ctypes.CDLL:
    """Return the compiled kernels, compiling them if this machine has not yet.

    Raises ``BuildError`` where there is no C compiler, or it refuses.
    """
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    if compiler is None:
        raise BuildError("no C compiler found (looked for $CC, cc and gcc)")
    path = _cache_directory() / f"kernels-{_fingerprint(compiler)}.so"
    if not path.exists():
        _compile(compiler, path)
    return ctypes.CDLL(str(path))


@cache
def available() -> bool:
    """Say whether the kernels can run here. Logs the reason once, as a warning, where they cannot."""
    try:
        library()
    except (BuildError, OSError) as error:
        logging.getLogger(__name__).warning("CPU kernels are not available, the portable path is used: %s", error)
        return False
    return True


def serves(x: torch.Tensor) -> bool:
    """Say whether the kernels take this tensor: on the CPU, float32 or bfloat16."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)


def wants_gradient(*tensors: torch.Tensor | None) -> bool:
    """Say whether autograd watches any of these."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def call(name: str, *arguments: torch.Tensor | float | ctypes.Array | ctypes._Pointer | None) -> None:
    """Run a kernel: tensors, made contiguous by the caller, go as pointers, None as null, ints as long.

    Profiles show it under its name, and a tape that records (``native/tape.py``) holds it.
    """
    run = getattr(library(), name)
    given = [*map(_argument, arguments)]
    if not _profiler_enabled():  # telling it costs as much as a small kernel
        run(*given)
    else:
        with record_function(name):
            run(*given)
    for recorder in recorders.now:
        recorder.add(run, given, arguments)


def is_bfloat16(x: torch.Tensor) -> int:
    """Return the flag by which kernels know a tensor's dtype."""
    return int(x.dtype == torch.bfloat16)


def _argument(x: torch.Tensor | float | ctypes.Array | ctypes._Pointer | None) -> object:
    if isinstance(x, torch.Tensor):
        assert x.is_contiguous()
        return ctypes.c_void_p(x.data_ptr())
    if isinstance(x, int):
        return ctypes.c_long(x)
    if isinstance(x, float):
        return ctypes.c_float(x)
    return ctypes.c_void_p(None) if x is None else x


def _cache_directory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsv4"


def _fingerprint(compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    parts = [version, " ".join(FLAGS).encode(), _processor().encode()]
    parts += [path.name.encode() + path.read_bytes() for path in sorted(SOURCES.glob("*.[ch]"))]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _processor() -> str:
    """What ``-march=native`` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


def _compile(compiler: str, path: Path) -> None:
    """Compile beside the final place and rename, so that processes may do so at once."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as directory:
            made = Path(directory) / path.name
            sources = sorted(str(source) for source in SOURCES.glob("*.c"))
            command = [compiler, *filter(None, FLAGS), "-o", str(made), *sources, "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise BuildError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
            made.replace(path)
    except OSError as error:
        raise BuildError(f"cannot write {path}: {error}") from error
