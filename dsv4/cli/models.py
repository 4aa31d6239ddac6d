"""Which model and tokenizer a path on the command line stands for, and the model itself, on this machine's device."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from dsv4.model.transformer import Transformer

Precision = Literal["float32", "bfloat16"]

TOKENIZER = "tokenizer.json"


def find_model(path: Path) -> Path:
    """Return the directory of the model that ``path`` stands for; a ValueError says what is missing."""
    from dsv4.checkpoint.training import MODEL, list_checkpoints

    if (path / MODEL / "config.json").is_file():
        return path / MODEL
    checkpoints = list_checkpoints(path / "checkpoints")
    if checkpoints:
        return checkpoints[-1].path / MODEL
    if any(path.glob("*.safetensors")):
        return path
    raise ValueError(
        f"path is {path}, which holds no model; expected a run with {MODEL}/ or checkpoints/step-..., or a directory "
        "with config.json and safetensors files"
    )


def find_tokenizer(model: Path) -> Path:
    """Return the tokenizer.json in a model's directory or, failing that, in the data of the run it is of."""
    model = model.resolve()
    run = model.parents[2] if model.parent.parent.name == "checkpoints" else model.parent
    places = (model, run / "data")
    for place in places:
        if (place / TOKENIZER).is_file():
            return place / TOKENIZER
    raise ValueError(f"{TOKENIZER} is missing; expected it in {' or '.join(map(str, places))}")


def open_model(directory: Path, precision: Precision) -> Transformer:
    """Load a model."""
    from dsv4.checkpoint.load import load_model

    return on_device(load_model(directory, precision))


def on_device(model: Transformer) -> Transformer:
    """Move a model to this machine's accelerator, if it has one."""
    import torch

    accelerator = torch.accelerator.current_accelerator()
    return model if accelerator is None else model.to(accelerator)
