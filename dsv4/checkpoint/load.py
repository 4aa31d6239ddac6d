"""Read a directory in the released layout into a model. Everything is checked before anything is loaded."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import torch

from dsv4.accounting.tensors import TensorSpec, inventory
from dsv4.checkpoint.leave import leave_in_files
from dsv4.checkpoint.names import released_tensors
from dsv4.checkpoint.save import INDEX
from dsv4.checkpoint.tensor_file import TensorFile
from dsv4.config.load import load_config
from dsv4.model.moe import Router
from dsv4.model.transformer import Transformer
from dsv4.ops.backend import BackendChoice

Precision = Literal["float32", "bfloat16"]
Weights = Literal["memory", "mapped"]

SINGLE = "model.safetensors"  # the one file of a checkpoint without an index
PROBLEMS_SHOWN = 20


def load_model(
    directory: str | os.PathLike[str],
    precision: Precision = "float32",
    *,
    weights: Weights = "memory",
    expert_bytes: int | None = None,
    backend: BackendChoice = "auto",
) -> Transformer:
    """Load a checkpoint directory and return the model in eval mode.

    precision: ``float32`` computes in float32 throughout; ``bfloat16`` holds matrices and activations in
    bfloat16, with the float32 islands of the released code. The directory holds ``config.json`` and
    safetensors files, with or without an index; a tensor that is missing, unknown, misshapen, of another
    dtype or truncated is a ``ValueError`` that lists every such tensor.

    weights: ``mapped`` leaves them in the files, which must stay as they are: a page is read when it is used,
    and given up when memory is short. Only what is stored in another dtype than asked for is copied; routed
    experts are cast where they are used. expert_bytes: routed experts are read into a pool of at most so many
    bytes, from the files or, with ``memory``, from CPU memory into a pool that an accelerator computes from.
    Either is for inference only.
    """
    for name, value, known in (("precision", precision, Precision), ("weights", weights, Weights)):
        if value not in get_args(known):
            raise ValueError(f"{name} is {value!r}; expected one of {', '.join(get_args(known))}")
    if expert_bytes is not None and expert_bytes < 1:
        raise ValueError(f"expert_bytes is {expert_bytes}; expected at least 1, or None for no pool")
    root = Path(directory)
    if not root.is_dir():
        raise ValueError(f"directory is {root}; expected a directory with config.json and safetensors files")
    config = load_config(root)
    files = _files(root)
    scale = next((name for name in files if name.endswith(".scale")), None)
    if scale is not None:
        raise ValueError(
            f"checkpoint {root} holds {scale}, so its matrices are quantised; expected bfloat16 or float32 ones: "
            "this version does not read FP8 and FP4"
        )
    # What the tensors are counts, not what the config says of them: widened copies often keep its quantisation.
    _check(root, files, inventory(replace(config, storage="float32")))
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    opened = [TensorFile(root / file) for file in sorted(set(files.values()))]
    if weights == "mapped" or expert_bytes is not None:
        model = leave_in_files(
            config, opened, dtype, is_mapped=weights == "mapped", expert_bytes=expert_bytes, backend=backend
        )
        _check_tables(root, model)
        return model
    model = Transformer(config, weight_dtype=dtype, activation_dtype=dtype, backend=backend)
    targets = dict(released_tensors(model))
    for file in opened:
        for name in file.tensors:
            file.load_(name, targets[name])
        file.close()
    _check_tables(root, model)
    return model.eval()


def _check_tables(root: Path, model: Transformer) -> None:
    """Refuse a hash layer's table that names an expert which is not there: nothing looks at it again."""
    count = model.config.moe.num_experts
    for name, module in model.named_modules():
        table = module.tid2eid if isinstance(module, Router) else None
        if table is None:
            continue
        lowest, highest = int(table.numpy().min()), int(table.numpy().max())  # no tensor is made for it
        if lowest < 0 or highest >= count:
            wrong = lowest if lowest < 0 else highest
            raise ValueError(f"checkpoint {root}: {name}.tid2eid holds expert {wrong}; expected 0 to {count - 1}")


def _files(root: Path) -> dict[str, str]:
    """Which file holds each tensor, by the index or, without one, by the single file's header."""
    index = root / INDEX
    if not index.is_file():
        if not (root / SINGLE).is_file():
            raise ValueError(f"checkpoint {root} has neither {INDEX} nor {SINGLE}; expected one of them")
        return dict.fromkeys(_header(root / SINGLE), SINGLE)
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        files = {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"index {index} is not readable ({error!r}); expected JSON with a weight_map") from error
    for file in set(files.values()):
        if Path(file).name != file or file in ("..", "."):
            raise ValueError(f"index {index} names the file {file!r}; expected a plain name inside {root}")
    return files


def _header(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of each tensor of a file, from its header. The file's length is checked against it."""
    file = TensorFile(path)
    file.close()
    return {name: (stored.shape, stored.dtype) for name, stored in file.tensors.items()}


def _check(root: Path, files: dict[str, str], specs: Iterable[TensorSpec]) -> None:
    """Raise one error that lists every difference between the files and the config's tensors."""
    expected = {spec.name: spec for spec in specs}
    problems = []
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    for file in sorted(set(files.values())):
        try:
            header = _header(root / file)
        except ValueError as error:
            problems.append(str(error))
            continue
        for name, shape_and_dtype in header.items():
            if files.get(name) != file:
                problems.append(f"{name}: in {file}; the index puts it in {files.get(name, 'no file')}")
            found[name] = shape_and_dtype
    problems += [f"{name}: missing" for name in expected if name not in found]
    problems += [f"{name}: unknown tensor" for name in found if name not in expected]
    known = found.keys() | expected.keys()
    problems += [f"{name}: in the index, but in no file" for name in files if name not in known]
    for name, (shape, dtype) in found.items():
        spec = expected.get(name)
        if spec is None:
            continue
        if shape != spec.shape:
            problems.append(f"{name}: has shape {list(shape)}; expected {list(spec.shape)}")
        allowed = ("I64",) if spec.dtype == "I64" else ("BF16", "F32")
        if dtype not in allowed:
            problems.append(f"{name}: has dtype {dtype}; expected {' or '.join(allowed)}")
    if problems:
        shown = problems[:PROBLEMS_SHOWN]
        more = [f"... and {len(problems) - len(shown)} more"] if len(problems) > len(shown) else []
        raise ValueError(f"checkpoint {root} does not fit its config.json:\n  " + "\n  ".join(shown + more))
