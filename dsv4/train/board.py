"""The records of a run as TensorBoard events, for who watches runs there. Needs the extra ``tensorboard``.

Every number of a record becomes a curve named ``kind/field``, drawn over steps; a list gives a curve for each of its
places. ``metrics.jsonl`` stays what a run measured: the events are a copy, and what is undone is hidden in them.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from dsv4.train.metrics import Record

CURVES = ("step", "validation")  # kinds whose numbers are drawn
NAMED = ("step", "tokens", "phase")  # fields that say where, not what


def require_tensorboard() -> None:
    """Raise ``ValueError`` if the extra is not installed."""
    try:
        import_module("tensorboard")
    except ImportError as error:
        raise ValueError(
            "run.tensorboard is true, which needs tensorboard; expected pip install 'dsv4[tensorboard]'"
        ) from error


class Board:
    """Writes events into ``directory``. ``step``: where the run stands; events of later steps there are hidden."""

    def __init__(self, directory: Path, step: int) -> None:
        self.directory = directory
        self._writer = _open(directory, step)

    def write(self, record: Record) -> None:
        """Write one record; they are on disk when this returns, so that a page beside a run shows it live."""
        kind = record["kind"]
        if kind == "rollback":
            self._writer.close()
            self._writer = _open(self.directory, record["step"])
        elif kind in CURVES:
            for name, value in record.items():
                if name not in NAMED:
                    self._draw(f"{kind}/{name}", value, record["step"])
        elif kind == "sample":
            self._writer.add_text("sample", f"{record['prompt']}{record['text']}", record["step"])
        self._writer.flush()

    def _draw(self, tag: str, value: object, step: int) -> None:
        if isinstance(value, list):
            for place, part in enumerate(value):
                self._draw(f"{tag}/{place}", part, step)
        elif isinstance(value, (bool, int, float)):  # not a word, and not the null of a step without such a number
            self._writer.add_scalar(tag, float(value), step)


def _open(directory: Path, step: int) -> Any:
    return import_module("torch.utils.tensorboard").SummaryWriter(str(directory), purge_step=step + 1)
