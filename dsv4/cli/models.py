"""Which model and tokenizer a path on the command line stands for, and the model itself, on this machine's device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dsv4.config.backend import BackendChoice

if TYPE_CHECKING:
    from dsv4.model.transformer import Transformer

Precision = Literal["released", "float32", "bfloat16"]
Weights = Literal["memory", "mapped"]

TOKENIZER = "tokenizer.json"


@dataclass(frozen=True, kw_only=True)
class Residence:
    """Where the weights are while the model runs, and what computes with them."""

    weights: Weights = "memory"
    """mapped: in the checkpoint's files, of which the system reads what is used; they may be larger than memory."""
    expert_bytes: int | None = None
    """Read routed experts when they are used, and keep the most used ones in so many bytes at most."""
    backend: BackendChoice = "auto"
    """How operations are computed: auto takes the fastest that was proved here; see docs/accelerators.md."""


RESIDENCE = Residence()


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


def check_residence(residence: Residence) -> None:
    """Raise ``ValueError`` for what would have no effect on this machine, or cannot be."""
    from dsv4.device import accelerator

    has_accelerator = accelerator() is not None
    if residence.expert_bytes is not None and residence.expert_bytes < 1:
        raise ValueError(f"--expert-bytes is {residence.expert_bytes}; expected at least 1")
    if residence.weights == "memory" and residence.expert_bytes is not None and not has_accelerator:
        raise ValueError(
            f"--expert-bytes is {residence.expert_bytes} with --weights memory; expected --weights mapped: without an "
            "accelerator experts would be copied from memory to memory"
        )
    if residence.weights == "mapped" and residence.expert_bytes is None and has_accelerator:
        raise ValueError(
            "--weights mapped is given without --expert-bytes; expected both: an accelerator computes with experts in "
            "its own memory"
        )


def open_model(directory: Path, precision: Precision, residence: Residence = RESIDENCE) -> Transformer:
    """Load a model, with a bar on standard error while it is read."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    from dsv4.checkpoint.load import load_model
    from dsv4.device import best
    from dsv4.ops.backend import resolve

    check_residence(residence)
    resolve(residence.backend, best())
    console = Console(stderr=True)
    progress = Progress(
        TextColumn("reading"), BarColumn(bar_width=20), DownloadColumn(binary_units=True),
        console=console, transient=True, disable=not console.is_terminal, redirect_stdout=False,
    )  # fmt: skip
    with progress:
        task = progress.add_task("reading", total=None)
        model = load_model(
            directory, precision, weights=residence.weights, expert_bytes=residence.expert_bytes,
            backend=residence.backend,
            tell=lambda done, total: progress.update(task, completed=done, total=total),
        )  # fmt: skip
    return on_device(model)


def on_device(model: Transformer) -> Transformer:
    """Move a model to this machine's accelerator, if it has one."""
    from dsv4.device import best

    return model.to(best())
