"""``dsv4 synth``: a checkpoint of random weights at a model's true sizes."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TransferSpeedColumn

from dsv4.accounting.tensors import inventory, num_shards, total_bytes
from dsv4.cli.format import gigabytes
from dsv4.config.load import load_config

if TYPE_CHECKING:
    from dsv4.config.model import ModelConfig


def synth(
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")],
    directory: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DST")],
    layers: Annotated[str | None, tyro.conf.arg(metavar="0,2,3")] = None,
    mtp: bool = False,
    seed: int = 0,
) -> None:
    """Write a checkpoint of random weights: some layers of a model, or all, at their true sizes and as released.

    Stopped in between, the same command goes on with the file it was at.

    Args:
        model: a preset (flash, pro, flash-base, pro-base, mini, nano, smoke), a checkpoint directory, or a config .json
            file. Weights are stored as its config says.
        directory: where to write it; new or empty.
        layers: which layers, numbered from 0, those routed by token id first; all without it. A layer holds the same
            weights whatever others are written.
        mtp: write the MTP block as well.
        seed: another one gives other weights.
    """
    import torch

    from dsv4.checkpoint.stream import check_target
    from dsv4.checkpoint.synth import synth_config, synthesise

    whole, chosen = load_config(model), _layers(layers)
    config = synth_config(whole, chosen, mtp=mtp)
    target = check_target(directory)
    notes = Console(stderr=True, highlight=False, soft_wrap=True)
    notes.print(_check_room(config, target), markup=False)
    start = time.perf_counter()
    progress = Progress(
        TextColumn("{task.description}"), BarColumn(bar_width=20), DownloadColumn(), TransferSpeedColumn(),
        TimeElapsedColumn(), console=notes, transient=True, redirect_stdout=False,
    )  # fmt: skip
    cores = torch.get_num_threads()
    torch.set_num_threads(1)  # each core draws and rounds a matrix of its own, and threads of threads would wait
    try:
        with progress:
            task = progress.add_task(target.name, total=None)
            synthesise(
                whole, target, layers=chosen, mtp=mtp, seed=seed, workers=cores,
                tell=lambda done, total: progress.update(task, completed=done, total=total),
            )  # fmt: skip
    finally:
        torch.set_num_threads(cores)
    specs = inventory(config)
    Console(highlight=False).print(
        f"{target}: {len(specs):,} tensors, {total_bytes(specs):,} bytes ({gigabytes(total_bytes(specs))}) in "
        f"{num_shards(config)} files, stored as {config.storage}, in {time.perf_counter() - start:.1f} s",
        soft_wrap=True, markup=False,
    )  # fmt: skip


def _layers(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(layer) for layer in text.split(","))
    except ValueError:
        raise ValueError(f"--layers is {text!r}; expected numbers with commas between them, such as 0,2,3") from None


def _check_room(config: ModelConfig, target: Path) -> str:
    """Say what is needed and what is free; refuse to begin what the disk has no room for.

    What an earlier run left counts as free: it is kept, or makes room.
    """
    partial = target.with_name(f".{target.name}.partial")
    left = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
    free, needed = shutil.disk_usage(target.parent).free + left, total_bytes(inventory(config))
    both = (
        f"{target} needs {needed:,} bytes ({gigabytes(needed)}), and {target.parent} has {free:,} free "
        f"({gigabytes(free)})"
    )
    if needed > free:
        raise OSError(f"{both}; expected room for all of it")
    return both
