"""A run read back from ``config.json`` and ``metrics.jsonl`` and put in order, for the report and whoever else asks.

What a rollback undid is set apart, so that ``steps`` are the steps that made the model.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import NamedTuple

from dsv4.config.recipes import load_run_config
from dsv4.config.train import Phase, TrainConfig
from dsv4.train.metrics import Record, read

UNDONE_BY_ROLLBACK = ("phase", "step", "validation", "checkpoint", "sample")
SWITCH_STEPS = 20  # shown on either side of a switch
FIT_STEPS = 8  # on either side, by which the jump is measured; so many leave it as uncertain as one step's loss
LEAST_SLOPED = 4  # steps that have a slope; fewer are averaged


@dataclass(frozen=True, kw_only=True)
class Span:
    """A phase as far as it was run. first_tokens: seen before it."""

    phase: Phase
    first_tokens: int
    steps: tuple[Record, ...]
    validations: tuple[Record, ...]

    @property
    def tokens(self) -> int:
        return self.steps[-1]["tokens"] - self.first_tokens


@dataclass(frozen=True, kw_only=True)
class Spike:
    """A loss too high, where it was met. tokens and loss_before: of the step before, rolled back or not."""

    step: int
    tokens: int
    loss: float
    loss_before: float


class Course(NamedTuple):
    """A line fitted to the losses on one side of a switch: nats at the switch, and per step."""

    height: float
    slope: float


@dataclass(frozen=True, kw_only=True)
class Switch:
    """The change from one phase to the next, with the course of the loss on either side.

    scatter: standard deviation of one step's loss, from differences of neighbouring steps; None where too few steps
    are known.
    """

    before: Span
    after: Span
    course_before: Course
    course_after: Course
    scatter: float | None

    @property
    def jump(self) -> float:
        """Nats by which the loss comes out of the switch higher than it went in."""
        return self.course_after.height - self.course_before.height


@dataclass(frozen=True, kw_only=True)
class History:
    """A run, in order. undone: the stretches of steps that rollbacks took back."""

    recipe: TrainConfig
    starts: tuple[Record, ...]
    steps: tuple[Record, ...]
    undone: tuple[tuple[Record, ...], ...]
    validations: tuple[Record, ...]
    baselines: tuple[Record, ...]
    spikes: tuple[Spike, ...]
    rollbacks: tuple[Record, ...]
    samples: tuple[Record, ...]
    end: Record | None

    @property
    def tokens(self) -> int:
        return self.steps[-1]["tokens"]

    @property
    def seconds(self) -> float:
        """Time spent in steps, those undone included."""
        return sum(step["seconds"] for stretch in (self.steps, *self.undone) for step in stretch)

    @property
    def bits_per_byte(self) -> float | None:
        """The last validation, None if there was none."""
        return self.validations[-1]["bits_per_byte"] if self.validations else None

    @property
    def divergences(self) -> tuple[float, ...]:
        """The KL to the teacher of each step that asked one."""
        found = (step.get("distill_kl") for step in self.steps)
        return tuple(kl for kl in found if kl is not None)

    @property
    def spans(self) -> tuple[Span, ...]:
        """The phases that have at least one step."""
        phases = {phase.name: phase for phase in self.recipe.phases}
        result, tokens = [], 0
        for name, steps in groupby(self.steps, key=lambda step: step["phase"]):
            validations = (each for each in self.validations if each["phase"] == name)
            span = Span(
                phase=phases[name], first_tokens=tokens, steps=tuple(steps), validations=tuple(validations)
            )  # fmt: skip
            result.append(span)
            tokens = span.steps[-1]["tokens"]
        return tuple(result)

    @property
    def switches(self) -> tuple[Switch, ...]:
        return tuple(_switch(before, after) for before, after in pairwise(self.spans))

    @property
    def expert_loads(self) -> tuple[tuple[float | None, ...], ...]:
        """The most loaded expert over the mean, by layer and step; None where a layer did not run."""
        layers = max(len(step["expert_load"]) for step in self.steps)
        return tuple(zip(*(_filled(step["expert_load"], layers) for step in self.steps), strict=True))

    @property
    def anticipatory(self) -> tuple[tuple[int, int], ...]:
        """Stretches of anticipatory routing: tokens seen before and after each."""
        result, tokens = [], 0
        for on, steps in groupby(self.steps, key=lambda step: step["anticipatory"]):
            last = list(steps)[-1]["tokens"]
            if on:
                result.append((tokens, last))
            tokens = last
        return tuple(result)


def read_history(run: Path) -> History:
    """Read the run in folder ``run``; a ``ValueError`` names the folder, or the file and line, if it is not one."""
    recipe, metrics = load_run_config(run), run / "metrics.jsonl"
    if not metrics.is_file():
        raise ValueError(f"run is {run}, which has no {metrics.name}; expected the folder of a run that was started")
    records = read(metrics)
    kept, undone = _without_undone(records)
    history = History(
        recipe=recipe,
        starts=_of("start", kept),
        steps=_of("step", kept),
        undone=undone,
        validations=_of("validation", kept),
        baselines=_of("baseline", kept),
        spikes=_spikes(records),
        rollbacks=_of("rollback", kept),
        samples=_of("sample", kept),
        end=next(iter(_of("end", kept)), None),
    )
    if not history.steps or not history.starts:
        raise ValueError(f"run is {run}, whose {metrics.name} holds no step; expected at least one")
    return history


def _of(kind: str, records: list[Record]) -> tuple[Record, ...]:
    return tuple(record for record in records if record["kind"] == kind)


def _without_undone(records: list[Record]) -> tuple[list[Record], tuple[tuple[Record, ...], ...]]:
    """Split records into those that hold and, a tuple for each rollback, the steps it took back."""
    kept: list[Record] = []
    undone: list[tuple[Record, ...]] = []
    for record in records:
        if record["kind"] == "rollback":
            later = [r for r in kept if r["kind"] in UNDONE_BY_ROLLBACK and r["step"] > record["step"]]
            undone.append(_of("step", later))
            kept = [r for r in kept if r["kind"] not in UNDONE_BY_ROLLBACK or r["step"] <= record["step"]]
        kept.append(record)
    return kept, tuple(undone)


def _spikes(records: list[Record]) -> tuple[Spike, ...]:
    result, before = [], None
    for record in records:
        if record["kind"] == "step":
            before = record
        elif record["kind"] == "spike" and before is not None:
            result.append(
                Spike(step=record["step"], tokens=before["tokens"], loss=record["loss"], loss_before=before["loss"])
            )
    return tuple(result)


def _filled(loads: list[float], layers: int) -> list[float | None]:
    return [*loads, *[None] * (layers - len(loads))]


def _switch(before: Span, after: Span) -> Switch:
    left = [step["loss"] for step in before.steps[-FIT_STEPS:]]
    right = [step["loss"] for step in after.steps[:FIT_STEPS]]
    return Switch(
        before=before,
        after=after,
        course_before=_course([place + 0.5 for place in range(-len(left), 0)], left),
        course_after=_course([place + 0.5 for place in range(len(right))], right),
        scatter=_scatter(left, right),
    )


def _scatter(*sides: list[float]) -> float | None:
    """Deviation of one step's loss: of neighbours' differences over root 2, each side's trend taken off."""
    changes = [[b - a for a, b in pairwise(side)] for side in sides]
    off = [change - statistics.fmean(side) for side in changes for change in side if len(side) > 1]
    return (statistics.fmean(x**2 for x in off) / 2) ** 0.5 if off else None


def _course(places: list[float], losses: list[float]) -> Course:
    """Fit a line to losses at places counted in steps from the switch, which lies between two steps."""
    if len(places) < LEAST_SLOPED:
        return Course(statistics.fmean(losses), 0.0)
    slope, height = statistics.linear_regression(places, losses)
    return Course(height, slope)
