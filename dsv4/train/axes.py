"""Axes over the tokens of a run, as every plot of the report has them: phases marked, lines named at their ends."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from dsv4.train.history import History, Span
from dsv4.train.metrics import Record
from dsv4.train.page import COLORS
from dsv4.train.words import count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, RULE, BLUE, ORANGE, RED, BAND = (
    COLORS[name] for name in ("ink", "muted", "rule", "blue", "orange", "red", "band")
)
WIDTH = 9.6  # inches
SMALL, NORMAL = 8.5, 9.5  # points
LETTER = 0.56  # width of an average letter, as a share of its size
ROW = 12  # points between rows of phase names
SMOOTHED_FROM = 150  # steps; fewer are drawn as they are
SMOOTHED_SHARE = 120  # the average takes in this part of the run's steps, on either side
ROOM = 1.08  # of an axis above its highest value
DOTTED_UP_TO = 40  # steps; so few are marked one by one


@dataclass(frozen=True)
class Line:
    """A number of each step, None where a step has none; ``name`` stands at the line's end.

    noisy: of long runs an average is drawn, the single steps pale behind it. stepped: it holds between two steps.
    """

    value: Callable[[Record], float | None]
    color: str
    name: str = ""
    noisy: bool = True
    stepped: bool = False


@dataclass(frozen=True)
class End:
    """A name at the end of a line."""

    x: float
    y: float
    name: str
    color: str


def panels(history: History, *titles_and_inches: tuple[str, float]) -> tuple[Figure, list[Axes]]:
    """Return a figure of panels, one below the other, over the run's tokens. Inches are without the titles."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    inches = [height for _, height in titles_and_inches]
    size = (WIDTH, sum(inches) + 0.45 * len(inches) + 0.3)
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(h_pad=0.09), facecolor="none")
    grid = list(figure.subplots(len(inches), 1, squeeze=False, sharex=True, height_ratios=inches).flat)
    for axes in grid:
        quiet(axes)
        _over_tokens(axes, history)
    rows = _name_phases(grid[0], history.spans, history.tokens)
    for axes, (text, _) in zip(grid, titles_and_inches, strict=True):
        pad = 7 + ROW * rows if axes is grid[0] else 7
        axes.set_title(text, loc="left", color=INK, fontsize=NORMAL + 0.5, fontweight="bold", pad=pad)
    grid[-1].set_xlabel("tokens", color=MUTED, fontsize=SMALL)
    return figure, grid


def quiet(axes: Axes) -> None:
    """Take everything off the axes but a base line and quiet marks."""
    axes.set_facecolor("none")
    axes.tick_params(which="both", colors=MUTED, labelsize=SMALL, length=0, pad=5)
    axes.grid(axis="y", color=RULE, linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.spines["bottom"].set_linewidth(0.7)


def curves(
    axes: Axes,
    history: History,
    *lines: Line,
    bottom: float | None = None,
    top: float | None = None,
    ends: Sequence[End] = (),
) -> None:
    """Draw lines over tokens and name them at their ends, beside other ``ends``.

    bottom, top: of the axis; with a bottom alone, the top is a little above all values.
    """
    tokens = [step["tokens"] for step in history.steps]
    marker = "." if len(tokens) <= DOTTED_UP_TO else ""
    found, highest = list(ends), 0.0
    for line in lines:
        values = [_or_gap(line.value(step)) for step in history.steps]
        highest = max([highest, *(value for value in values if not math.isnan(value))])
        if line.noisy and len(values) >= SMOOTHED_FROM:
            axes.plot(tokens, values, color=line.color, linewidth=0.6, alpha=0.3)
            values = [v for span in history.spans for v in _averaged(span, line, len(values) // SMOOTHED_SHARE)]
        axes.plot(
            tokens, values, color=line.color, linewidth=1.7, marker=marker, markersize=5, clip_on=False,
            drawstyle="steps-pre" if line.stepped else "default",
        )  # fmt: skip
        known = [(x, y) for x, y in zip(tokens, values, strict=True) if not math.isnan(y)]
        if known and line.name:
            found.append(End(*known[-1], line.name, line.color))
    if bottom is not None and top is None and highest > bottom:
        top = bottom + ROOM * (highest - bottom)
    axes.set_ylim(bottom, top)
    name_ends(axes, found)


def name_ends(axes: Axes, ends: Sequence[End]) -> None:
    """Write names beside the ends of lines, moved up where two would touch. The axes' limits must be final."""
    axes.get_ylim()  # applies what autoscaling has pending
    to_share = axes.transScale + axes.transLimits
    points = axes.bbox.height / axes.figure.dpi * 72
    gap, floor = SMALL * 1.3 / points, -math.inf
    for end in sorted(ends, key=lambda end: end.y):
        share = max(float(to_share.transform((end.x, end.y))[1]), floor)
        floor = share + gap
        axes.annotate(
            end.name, (end.x, share), xycoords=axes.get_xaxis_transform(), xytext=(6, 0), textcoords="offset points",
            va="center", color=end.color, fontsize=SMALL, fontweight="bold", annotation_clip=False,
        )  # fmt: skip


def _over_tokens(axes: Axes, history: History) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_xlim(0, history.tokens)
    axes.xaxis.set_major_locator(MaxNLocator(8))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: count(tokens)))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    for span in history.spans[1:]:
        axes.axvline(span.first_tokens, color=MUTED, linewidth=0.7, linestyle=(0, (1, 3)), zorder=1)


def _name_phases(axes: Axes, spans: Sequence[Span], tokens: int) -> int:
    """Write each phase's name above its beginning, in as many rows as keep them apart; return the rows.

    From the last to the first: a name that would run into a later one goes above it, so that no mark crosses a name.
    """
    placed: list[tuple[float, int]] = []  # beginning, as a share of the axis, and row
    for span in reversed(spans):
        begin = span.first_tokens / tokens
        end = begin + (len(span.phase.name) + 1.5) * LETTER * SMALL / (WIDTH * 72 * 0.9)
        row = next(row for row in range(len(spans)) if all(end <= other for other, at in placed if at >= row))
        placed.append((begin, row))
        axes.annotate(
            span.phase.name, (begin, 1), xycoords="axes fraction", xytext=(3, 4 + ROW * row),
            textcoords="offset points", color=MUTED, fontsize=SMALL, annotation_clip=False,
        )  # fmt: skip
        axes.annotate(
            "", (begin, 1), xycoords="axes fraction", xytext=(0, 11 + ROW * row), textcoords="offset points",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 0},
        )  # fmt: skip
    return max(row for _, row in placed) + 1


def _averaged(span: Span, line: Line, half: int) -> list[float]:
    """Average each step with ``half`` steps on either side, fewer near the ends of the phase, so that nothing lags."""
    values = [line.value(step) for step in span.steps]
    sums = [0.0, *accumulate(value or 0.0 for value in values)]
    counts = [0, *accumulate(value is not None for value in values)]
    result = []
    for place, value in enumerate(values):
        reach = min(half, place, len(values) - 1 - place)
        first, stop = place - reach, place + reach + 1
        known = counts[stop] - counts[first]
        result.append(_or_gap(None if value is None else (sums[stop] - sums[first]) / known))
    return result


def _or_gap(value: float | None) -> float:
    return math.nan if value is None else value
