"""metrics.jsonl: all that a run measured, one JSON object a line, in the order it happened.

A record is its kind and the fields that ``FIELDS`` lists for it, in that order. Fields are numbers, strings, booleans
and lists of numbers; null where a step has no such number. Tokens are counted after the step, losses are nats a
token, ``bits_per_byte`` is over the UTF-8 bytes of the text. There is no NaN: a run stops before it writes one.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from dsv4.config.files import write_then_rename

Record = dict[str, Any]

FIELDS: dict[str, tuple[str, ...]] = {
    # a process begins, a first or a resumed one; time is ISO 8601, matmul_flops this machine's FLOP/s
    "start": (
        "step", "tokens", "time", "model", "parameters_total", "parameters_activated", "matmul_flops", "torch",
        "threads",
    ),
    # a phase begins with the next step
    "phase": ("step", "tokens", "phase", "sequence", "attention", "train"),
    # one optimiser step; mtp_loss, distill_kl and what is the indexer's may be null. distill_kl: to the teacher, if the
    # run has one. grad_norm: before clipping. expert_load: of each MoE layer, the most loaded expert over the mean; the
    # MTP block's last, left out where the block did not run. flops_utilisation, packing_utilisation: 0 to 1
    "step": (
        "step", "tokens", "phase", "loss", "mtp_loss", "distill_kl", "balance_loss", "indexer_kl",
        "indexer_captured", "indexer_recall", "lr", "mtp_weight", "grad_norm", "indexer_grad_norm", "expert_load",
        "seconds", "tokens_per_second", "flops_utilisation", "memory_bytes", "packing_utilisation", "batch_tokens",
        "anticipatory",
    ),
    "validation": ("step", "tokens", "phase", "loss", "bits_per_byte", "attention"),
    # what the model is compared with
    "baseline": ("name", "bits_per_byte"),
    # the last record of its step, written before the checkpoint is
    "checkpoint": ("step", "tokens", "path"),
    # a loss that was too high, and by how many smoothed deviations
    "spike": ("step", "loss", "expected", "deviation"),
    # training goes on from ``step``; what came after it, up to ``from_step``, is undone
    "rollback": ("step", "from_step"),
    # this step's loss or gradients were not finite; the run stops
    "nonfinite": ("step",),
    # anticipatory routing is switched on or off
    "anticipatory": ("step", "on"),
    # text is what the model wrote after the prompt
    "sample": ("step", "prompt", "text"),
    "end": ("step", "tokens", "seconds", "bits_per_byte"),
}  # fmt: skip

OPTIONAL = frozenset({"distill_kl"})  # fields that a record may lack


class MetricsLog:
    """Appends records to a file. A killed run leaves all that it appended, but for one torn line perhaps.

    Nothing stays open between records, so that the file can be truncated and renamed meanwhile.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: Mapping[str, object]) -> None:
        """Append one record. Raises ``ValueError`` for a kind, field or number that does not belong in the file.

        A checkpoint's record reaches the disk before this returns, so that no checkpoint is without its record.
        """
        fields = dict(record)
        kind = fields.pop("kind", None)
        problem = _problem(kind, fields)
        if problem is not None:
            raise ValueError(f"record: {problem}")
        with self.path.open("a+b") as file:
            _refuse_torn(self.path, file)
            file.write(_line(record).encode())
            file.flush()
            if kind == "checkpoint":
                os.fsync(file.fileno())


def read(path: Path) -> list[Record]:
    """Return all records in the order written.

    What follows the last line's end was being written when the run was killed, and is left out. Any other damage
    is a ``ValueError`` with the file and the line.
    """
    lines = path.read_bytes().split(b"\n")
    return [_parse(path, number, line) for number, line in enumerate(lines[:-1], start=1)]


def truncate(path: Path, step: int) -> None:
    """Take the log back to the checkpoint of ``step``, so that a resumed run's log equals an unstopped one's.

    All that follows the checkpoint's own record goes: file order, not step numbers, because a rollback makes step
    numbers return. Without such a record (step 0) every record of a later step goes. Written beside and renamed.
    """
    records = read(path)
    checkpoints = [
        place for place, record in enumerate(records) if record["kind"] == "checkpoint" and record["step"] == step
    ]
    if checkpoints:
        kept = records[: checkpoints[-1] + 1]
    else:
        kept = [record for record in records if record.get("step", 0) <= step]
    write_then_rename(path, lambda partial: _write_all(partial, kept))


def _write_all(path: Path, records: Iterable[Record]) -> None:
    path.write_text("".join(_line(record) for record in records), encoding="utf-8", newline="\n")


def _line(record: Mapping[str, object]) -> str:
    """Write a record in the order of ``FIELDS``, whatever order it was given in."""
    ordered = {name: record[name] for name in ("kind", *FIELDS[str(record["kind"])]) if name in record}
    return json.dumps(ordered, allow_nan=False) + "\n"


def _refuse_torn(path: Path, file: IO[bytes]) -> None:
    """Raise if the file's last line has no end: a record put behind it would be lost with it."""
    if file.tell() > 0:
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            raise ValueError(f"{path} ends in a torn line; expected it truncated to a checkpoint before it goes on")


def _parse(path: Path, number: int, line: bytes) -> Record:
    try:
        record = json.loads(line)
    except ValueError as error:  # not UTF-8, or not JSON
        raise ValueError(f"{path}, line {number}: {error}; expected one JSON object") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path}, line {number}: the line holds a {type(record).__name__}; expected a JSON object")
    fields = dict(record)
    problem = _problem(fields.pop("kind", None), fields)
    if problem is not None:
        raise ValueError(f"{path}, line {number}: {problem}")
    return record


def _problem(kind: object, fields: Record) -> str | None:
    """Say what is wrong with a record, if anything is."""
    if not isinstance(kind, str) or kind not in FIELDS:
        return f"kind is {kind!r}; expected one of {', '.join(FIELDS)}"
    wrong = sorted((fields.keys() ^ set(FIELDS[kind])) - (OPTIONAL - fields.keys()))
    if wrong:
        does = "has" if wrong[0] in fields else "lacks"
        return f"{kind} {does} field {wrong[0]!r}; expected {', '.join(FIELDS[kind])}"
    for name, value in fields.items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                return f"{kind}: {name} is {value}; expected finite numbers"
    return None
