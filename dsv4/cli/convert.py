"""``dsv4 convert``: a checkpoint from one storage to another."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dsv4.cli.format import gigabytes

Form = Literal["instruct", "base", "bfloat16"]


def convert(
    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")],
    target: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DST")],
    form: Annotated[Form, tyro.conf.arg(name="format")],
    lossy: bool = False,
) -> None:
    """Write a checkpoint in another storage; run again after it was cut off, it goes on where it was.

    Args:
        source: a checkpoint directory of any storage, or the folder of a training run.
        target: a directory that does not exist yet, or is empty. Until all is written it is .DST.partial beside it.
        form: instruct (routed experts FP4, other matrices FP8, as in Flash and Pro), base (all of them FP8, with
            float32 scales, as in the Base releases) or bfloat16.
        lossy: from FP4 to base, round values that FP8 lacks; without it they are an error.
    """
    from dsv4.checkpoint.convert import convert as run

    began = time.perf_counter()
    progress = Progress(
        TextColumn("{task.description}"), BarColumn(bar_width=20), DownloadColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(), console=Console(stderr=not sys.stdout.isatty(), highlight=False),
        transient=True, redirect_stdout=False,
    )  # fmt: skip
    with progress:
        task = progress.add_task(form, total=None)
        path = run(
            source, target, form, lossy=lossy,
            tell=lambda done, total: progress.update(task, completed=done, total=total),
        )  # fmt: skip
    sizes = [file.stat().st_size for file in path.rglob("*") if file.is_file()]
    print(
        f"{path}: {len(sizes):,} files, {sum(sizes):,} bytes ({gigabytes(sum(sizes))}) "
        f"in {time.perf_counter() - began:.1f} s"
    )
