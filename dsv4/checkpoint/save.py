"""Write a model as a directory in the released layout."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import torch
from safetensors.torch import save_file

from dsv4.accounting.tensors import inventory, num_shards, shard_name, total_bytes
from dsv4.checkpoint.names import released_tensors
from dsv4.config.load import save_config
from dsv4.config.model import Storage
from dsv4.model.transformer import Transformer

INDEX = "model.safetensors.index.json"

_STORAGE: dict[torch.dtype, Storage] = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def save_model(model: Transformer, directory: str | os.PathLike[str]) -> None:
    """Write ``model`` to ``directory``: shards, index and ``config.json``, under the released names.

    Every parameter keeps its dtype, so that loading gives the same bits. The directory must not exist yet, or
    be empty; it appears complete or not at all. Raises ``ValueError`` otherwise, before anything is written.
    """
    target = Path(directory)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"directory is {target}, which exists and is not empty; expected a new or empty one")
    if not target.parent.is_dir():
        raise ValueError(f"directory is {target}, but {target.parent} does not exist; expected an existing parent")
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    partial.mkdir()
    try:
        _write(model, partial)
        partial.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(model: Transformer, directory: Path) -> None:
    config = replace(model.config, storage=_STORAGE[model.weight_dtype])
    tensors = dict(released_tensors(model))
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
    save_config(config, directory / "config.json")
