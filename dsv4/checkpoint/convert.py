"""A checkpoint from one storage to another, tensor by tensor: released, Base, or widened to bfloat16.

    to          routed experts                      other matrices of the two releases     everything else
    instruct    FP4, E8M0 scales                    FP8, E8M0 scales                       as stored, BF16 and F32
    base        FP8, F32 scales                     FP8, F32 scales                        the same
    bfloat16    BF16                                BF16                                   the same

Codes are copied where the target has the same. FP4 becomes FP8 without loss or not at all, unless that is asked for
(``dsv4.ops.lowbit.reblock``), and an E8M0 scale becomes the F32 one of the same value. What is left is the way from F32
scales, or none, to others: it goes through float32 and is rounded.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import torch

from dsv4.accounting.tensors import TensorSpec
from dsv4.checkpoint.generation import GENERATION, generation_config
from dsv4.checkpoint.source import Source, open_source
from dsv4.checkpoint.stream import CONFIG, Tell, check_target, write_stream
from dsv4.checkpoint.training import MODEL
from dsv4.config.model import ModelConfig, Storage
from dsv4.ops.backend import Backend, resolve
from dsv4.ops.lowbit import Packed, dequantise, quantise_blocks, quantise_fp4, reblock

Form = Literal["instruct", "base", "bfloat16"]

STORAGE: dict[Form, Storage] = {"instruct": "fp4", "base": "fp8", "bfloat16": "bfloat16"}
COPIED = ("tokenizer.json", "tokenizer_config.json")
ENCODING = "encoding"  # the release's folder for the chat format

_VERSION = 1  # goes up when the same source gives other bytes: a conversion begun before then starts again
_DTYPE = {"BF16": torch.bfloat16, "F32": torch.float32, "I64": torch.int64}


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    form: Form,
    *,
    lossy: bool = False,
    tell: Tell = lambda done, total: None,
) -> Path:
    """Write a checkpoint of any storage to ``target``, new or empty, in another; return its whole path.

    source: a checkpoint's directory, or that of a run of ours. The tokenizer's files and the folder ``encoding`` are
    copied with it. lossy: let FP4 experts whose scales lie too far apart for FP8 be rounded; for those to ``base``
    alone. tell: see ``write_stream``, which also says how a conversion goes on that was cut off.

    Raises ``ValueError``: before anything is written for a source whose tensors are not those of its config and for a
    storage that the model's sizes do not allow; during it, with tensor and file, for a scale that is no positive
    number and for a matrix that cannot be stored.
    """
    if form not in get_args(Form):
        raise ValueError(f"form is {form!r}; expected one of {', '.join(get_args(Form))}")
    whole_path = check_target(target)
    opened = open_source(_model_directory(Path(source)))
    config = replace(opened.config, storage=STORAGE[form])
    if lossy and (opened.config.storage, form) != ("fp4", "base"):
        raise ValueError(f"lossy is given for {opened.config.storage} to {form}; expected fp4 to base: others round")
    write_stream(
        whole_path,
        config,
        lambda specs: _make(opened, specs, lossy),
        key=_key(opened, form, lossy),
        files=_other_files(opened.root, config),
        tell=tell,
    )
    return whole_path


def _model_directory(path: Path) -> Path:
    """The directory of the model that a checkpoint's or a run's directory stands for: a run has a config of its own."""
    return path / MODEL if (path / MODEL / CONFIG).is_file() else path


def _make(source: Source, specs: Sequence[TensorSpec], lossy: bool) -> Iterator[tuple[TensorSpec, torch.Tensor]]:
    """See ``dsv4.checkpoint.stream.Make``. In an inventory, scales come right after their codes."""
    remaining = iter(specs)
    for spec in remaining:
        if spec.dtype in ("I8", "F8_E4M3"):
            scale = next(remaining)
            packed = _in_codes(source, spec, scale, lossy)
            yield spec, packed.codes
            yield scale, packed.scales
        else:
            held = source.matrix(spec.name)
            dtype = _DTYPE[spec.dtype]
            yield spec, dequantise(held, dtype, backend=_backend()) if isinstance(held, Packed) else held.to(dtype)


def _in_codes(source: Source, spec: TensorSpec, scale: TensorSpec, lossy: bool) -> Packed:
    """A matrix in the codes and scales that the target has."""
    held = source.matrix(spec.name)
    kind = "fp4" if spec.dtype == "I8" else "fp8"
    scale_dtype = torch.float32 if scale.dtype == "F32" else torch.uint8
    try:
        if isinstance(held, Packed):
            if (held.kind, kind) == ("fp4", "fp8"):
                held = reblock(held, lossy=lossy, backend=_backend())
            if held.kind == kind and scale_dtype == torch.float32:
                held = _with_float_scales(held)
            if (held.kind, held.scales.dtype) == (kind, scale_dtype):
                return held
            held = dequantise(held, torch.float32, backend=_backend())
        if kind == "fp4":
            return quantise_fp4(held, backend=_backend())
        return quantise_blocks(held, scale_dtype, backend=_backend())
    except ValueError as error:
        raise ValueError(f"{spec.name} in {source.files[spec.name].path}: {error}") from error


def _with_float_scales(packed: Packed) -> Packed:
    """The same numbers, exactly: every E8M0 scale is a float32."""
    if packed.scales.dtype == torch.float32:
        return packed
    return Packed(packed.codes, packed.scales.view(torch.float8_e8m0fnu).float(), packed.kind)


def _backend() -> Backend:
    return resolve("auto", torch.device("cpu"))  # all give the same bits


def _key(source: Source, form: Form, lossy: bool) -> str:
    """What decides the bytes: the source by path, size and time of its files, the form, and this code."""
    stats = {file.path: file.path.stat() for file in source.files.values()}
    stamps = sorted((path.name, stat.st_size, stat.st_mtime_ns) for path, stat in stats.items())
    digest = hashlib.sha256(json.dumps(stamps).encode()).hexdigest()
    words = f"{source.root.resolve()} stored as {source.config.storage}, files {digest}, to {form}"
    return f"{words}{', lossy' if lossy else ''}, conversion {_VERSION}"


def _other_files(root: Path, config: ModelConfig) -> dict[str, bytes]:
    """The small files that belong to a checkpoint, by their path inside it."""
    paths = [root / name for name in COPIED if (root / name).is_file()]
    paths += [path for path in sorted((root / ENCODING).rglob("*")) if path.is_file() and path.suffix != ".pyc"]
    files = {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}
    return files | {GENERATION: generation_config(config)}
