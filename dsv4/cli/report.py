"""``dsv4 report``: a training run as one HTML file with plots, and its outcome in a few lines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from dsv4.train.findings import headline
from dsv4.train.history import History, read_history
from dsv4.train.report import write_report
from dsv4.train.words import count, duration


def report(run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]) -> None:
    """Write report.html into the folder of a training run, finished or not, and print what came of it.

    Args:
        run: the folder that dsv4 train wrote.
    """
    path = write_report(run)
    history = read_history(run)
    console = Console(highlight=False)
    console.print(headline(history), soft_wrap=True, markup=False)
    console.print(_phases(history))
    console.print(str(path), soft_wrap=True, markup=False)


def _phases(history: History) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("phase")
    for name in ("steps", "tokens", "loss", "bits/byte", "time"):
        table.add_column(name, justify="right")
    for span in history.spans:
        table.add_row(
            span.phase.name,
            f"{len(span.steps):,}",
            count(span.tokens),
            f"{span.steps[-1]['loss']:.3f}",
            f"{span.validations[-1]['bits_per_byte']:.3f}" if span.validations else "-",
            duration(sum(step["seconds"] for step in span.steps)),
        )
    return table
