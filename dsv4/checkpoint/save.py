"""Write a model as a directory in the released layout."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import torch
from safetensors.torch import save_file

from dsv4.accounting.tensors import Dtype, inventory, num_shards, shard_name, total_bytes
from dsv4.checkpoint.generation import GENERATION, generation_config
from dsv4.checkpoint.names import released_tensors
from dsv4.config.load import save_config
from dsv4.config.model import ModelConfig, Storage
from dsv4.model.precision import is_packed
from dsv4.model.transformer import Transformer

INDEX = "model.safetensors.index.json"

_STORAGE: dict[torch.dtype, Storage] = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_DTYPE: dict[Dtype, torch.dtype] = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
}


def save_model(model: Transformer, directory: str | os.PathLike[str]) -> None:
    """Write ``model`` to ``directory``: shards, index and ``config.json``, under the released names.

    Every parameter keeps its dtype, and codes stay codes, so that loading gives the same bits. The directory must not
    exist yet, or be empty; it appears complete or not at all. Raises ``ValueError`` otherwise, before anything is
    written.
    """
    target = Path(directory).resolve()
    config = _stored_config(model)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"directory is {target}, which exists and is not empty; expected a new or empty one")
    if not target.parent.is_dir():
        raise ValueError(f"directory is {target}, but {target.parent} does not exist; expected an existing parent")
    partial = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".partial"))
    try:
        _write(model, config, partial)
        partial.chmod(0o755)
        partial.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _stored_config(model: Transformer) -> ModelConfig:
    """The model's config with the storage its parameters have; raises if they are not all as one has them."""
    dtype = model.embed.weight.dtype
    if dtype not in _STORAGE:
        raise ValueError(f"embed.weight has dtype {dtype}; expected {' or '.join(str(known) for known in _STORAGE)}")
    config = model.config if is_packed(model) else replace(model.config, storage=_STORAGE[dtype])
    tensors = dict(stored_tensors(model, config))
    wrong = [
        f"{spec.name} has dtype {tensors[spec.name].dtype}; expected {_DTYPE[spec.dtype]}"
        for spec in inventory(config)
        if tensors[spec.name].dtype != _DTYPE[spec.dtype]
    ]
    if wrong:
        raise ValueError("\n".join(["the model cannot be saved as " + config.storage, *wrong[:20]]))
    return config


def stored_tensors(model: Transformer, config: ModelConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every released name with its tensor as it is stored: codes in the dtype that the config's storage has."""
    bytes_of = {
        spec.name: _DTYPE[spec.dtype] for spec in inventory(config) if spec.dtype in ("I8", "F8_E4M3", "F8_E8M0")
    }
    for name, tensor in released_tensors(model):
        is_code = tensor.dtype == torch.uint8 and name in bytes_of
        yield name, tensor.view(bytes_of[name]) if is_code else tensor


def _write(model: Transformer, config: ModelConfig, directory: Path) -> None:
    tensors = dict(stored_tensors(model, config))
    specs = inventory(config)
    total = num_shards(config)
    for shard, members in groupby(specs, key=lambda spec: spec.shard):
        content = {spec.name: tensors[spec.name].contiguous() for spec in members}
        save_file(content, directory / shard_name(shard, total), metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": total_bytes(specs)},
        "weight_map": {spec.name: shard_name(spec.shard, total) for spec in specs},
    }
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    (directory / GENERATION).write_bytes(generation_config(config))
    save_config(config, directory / "config.json")
