"""``dsv4 train``: a run from a recipe, or the rest of one that was stopped."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dsv4.config.recipes import RECIPES, load_recipe
from dsv4.config.train import TrainConfig

if TYPE_CHECKING:
    from dsv4.train.loop import Record, Trainer

RUN_FAILED, INTERRUPTED = 1, 130  # exit codes

USAGE = """usage: dsv4 train RECIPE --run DIR [--key value ...]    start a run
       dsv4 train --resume DIR [--from STEP]            continue one

RECIPE is a TOML file or one of {names}.
dsv4 train RECIPE --help lists every choice of a recipe, its value and where it comes from.
"""


@dataclass(frozen=True, kw_only=True)
class Start:
    """Train a DeepSeek-V4 model by a recipe."""

    run: Path
    """The folder of the run; it must not hold one yet."""
    recipe: Annotated[TrainConfig, tyro.conf.arg(name="")]


@dataclass(frozen=True, kw_only=True)
class Resume:
    """Continue a run from its newest checkpoint, to the bit as if it had never stopped."""

    resume: Path
    """The folder of the run."""
    from_step: Annotated[int | None, tyro.conf.arg(name="from")] = None
    """The step of an older checkpoint to go back to, in place of the newest. Later ones are removed."""


def train(argv: Sequence[str]) -> None:
    """Run ``dsv4 train`` with these arguments."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE.format(names=", ".join(RECIPES)), end="")
        return
    if argv[0].startswith("--resume"):
        options = tyro.cli(Resume, prog="dsv4 train", args=argv)
        _resume(options.resume, options.from_step)
        return
    if argv[0].startswith("-"):
        raise ValueError(f"the first argument is {argv[0]}; expected a recipe or --resume")
    recipe = load_recipe(argv[0])
    default = Start(run=tyro.MISSING, recipe=recipe)
    options = tyro.cli(Start, prog=f"dsv4 train {argv[0]}", default=default, args=argv[1:])
    _start(options.recipe, options.run)


def _start(config: TrainConfig, run: Path) -> None:
    from dsv4.checkpoint.training import list_checkpoints

    log = run / "metrics.jsonl"
    if list_checkpoints(run / "checkpoints") or "step" in _kinds(log):
        raise ValueError(f"run is {run}, which holds a run already; expected a new folder, or --resume {run}")
    display = Display(config)
    trainer = _build(config, run, display, resume=False)
    log.unlink(missing_ok=True)  # of a run that was stopped before its first step
    _train(trainer, display)


def _kinds(log: Path) -> set[str]:
    """The kinds of record in a log; none if there is no log."""
    from dsv4.train.metrics import read

    return {record["kind"] for record in read(log)} if log.exists() else set()


def _resume(run: Path, from_step: int | None) -> None:
    from dsv4.checkpoint.training import list_checkpoints
    from dsv4.config.recipes import load_run_config

    config = load_run_config(run)
    found = {checkpoint.step: checkpoint.path for checkpoint in list_checkpoints(run / "checkpoints")}
    if not found:
        raise ValueError(f"run is {run}, which has no checkpoint; expected one in {run / 'checkpoints'}")
    step = max(found) if from_step is None else from_step
    if step not in found:
        raise ValueError(f"--from is {step}; expected one of {', '.join(map(str, sorted(found)))}")
    display = Display(config)
    is_complete = step == max(found) and "end" in _kinds(run / "metrics.jsonl")
    if is_complete:
        display.console.print(f"the run is complete: {step} steps")
        if (run / "model").is_dir():
            return
    trainer = _build(config, run, display, resume=True)
    if is_complete:
        trainer.restore(found[step])
        _finish(trainer, display)
        return
    trainer.resume(found[step])
    display.console.print(f"resumed from step {step}")
    _train(trainer, display)


def _build(config: TrainConfig, run: Path, display: Display, *, resume: bool) -> Trainer:

    from dsv4.cli.process import keep_freed_memory
    from dsv4.device import best
    from dsv4.train.board import require_tensorboard
    from dsv4.train.loop import Trainer
    from dsv4.train.setup import set_up

    keep_freed_memory()
    if config.run.tensorboard:
        require_tensorboard()
    with display.console.status("preparing") as status:
        parts = set_up(
            config, run, device=best(), resume=resume, progress=lambda what, n: status.update(f"{what}: {n:,}")
        )
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Trainer(parts, clock=time.perf_counter, today=now, tell=display.show)


def _train(trainer: Trainer, display: Display) -> None:
    """Train to the end. What stops a run that was set up well is told in one red line."""
    from dsv4.train.board import Board
    from dsv4.train.loop import SpikeError
    from dsv4.train.nonfinite import NonFiniteError

    if trainer.config.run.tensorboard:
        board = Board(trainer.parts.run / "tensorboard", trainer.position.step)
        trainer.listen(board.write)
    try:
        with display.progress:
            trainer.train()
    except KeyboardInterrupt:
        run = trainer.parts.run
        display.console.print(f"stopped; dsv4 train --resume {run} goes on from the last checkpoint", markup=False)
        raise SystemExit(INTERRUPTED) from None
    except (NonFiniteError, SpikeError) as error:
        Console(stderr=True, soft_wrap=True).print(f"error: {error}", style="red", markup=False, highlight=False)
        raise SystemExit(RUN_FAILED) from error
    _finish(trainer, display)


def _finish(trainer: Trainer, display: Display) -> None:
    from dsv4.checkpoint.save import save_model
    from dsv4.train.setup import finish

    display.console.print(f"model: {finish(trainer.parts, save_model)}")


class Display:
    """The run on a terminal: one live line, and a lasting one for each thing that happens."""

    def __init__(self, config: TrainConfig) -> None:
        self.console = Console(stderr=not sys.stdout.isatty(), highlight=False, soft_wrap=True)
        self.total = sum(phase.tokens for phase in config.phases)
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=20), TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=self.console,
        )  # fmt: skip
        self.task: TaskID = self.progress.add_task("", total=self.total, numbers="")

    def show(self, record: Record) -> None:
        """Show one record of the run."""
        kind = record["kind"]
        if kind == "step":
            self.progress.update(
                self.task, completed=record["tokens"], description=str(record["phase"]),
                numbers=STEP.format_map(record),
            )  # fmt: skip
        elif kind in LINES:
            self.console.print(LINES[str(kind)].format_map(record), markup=False)


STEP = "step {step}  loss {loss:.3f}  {tokens_per_second:,.0f} tokens/s  {flops_utilisation:.0%} of the matmul rate"

LINES = {
    "start": "{model}: {parameters_total:,} parameters, {parameters_activated:,} activated",
    "phase": "phase {phase}: {attention} attention, rows of {sequence} tokens",
    "validation": "step {step}: validation loss {loss:.4f}, {bits_per_byte:.4f} bits per byte",
    "baseline": "baseline, {name}: {bits_per_byte:.4f} bits per byte",
    "sample": "sample: {prompt}{text}",
    "spike": "step {step}: loss {loss:.4f} is a spike, {expected:.4f} was expected",
    "rollback": "back to step {step}",
    "end": "done: {tokens:,} tokens in {seconds:.0f} s, {bits_per_byte:.4f} bits per byte",
}
