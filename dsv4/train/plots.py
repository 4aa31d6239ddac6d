"""Draw a run: one function a plot, each from a ``History``; None where the run has nothing to draw.

Figures are made and saved directly, never through pyplot, and with every setting of their own: the same history gives
the same SVG, byte for byte.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dsv4.train.axes import (
    BAND,
    BLUE,
    INK,
    MUTED,
    NORMAL,
    ORANGE,
    RED,
    SMALL,
    WIDTH,
    End,
    Line,
    curves,
    name_ends,
    panels,
    quiet,
)
from dsv4.train.history import FIT_STEPS, SWITCH_STEPS, History, Switch
from dsv4.train.metrics import Record
from dsv4.train.page import HEAT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Plot = Callable[[History], "Figure | None"]

HEAT_LEVELS = (1, 1.25, 1.5, 1.75, 2, 2.5, 3, 4)  # where the colours of expert load begin; the last has no end
HEAT_CELLS = 1200  # rectangles of the heat map


def check_matplotlib() -> None:
    """Raise a ``ValueError`` that names the extra if matplotlib is not installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "the report needs matplotlib, which is not installed; expected: pip install 'dsv4[plot]'"
        ) from error


def svg(plot: Plot, history: History) -> str | None:
    """Draw a plot as the text of an SVG file."""
    with _settings():
        figure = plot(history)
        if figure is None:
            return None
        text = io.StringIO()
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(text, format="svg", metadata=metadata)  # pyright: ignore[reportArgumentType]
        return text.getvalue()


@contextmanager
def _settings() -> Iterator[None]:
    """matplotlib as it comes, whatever the user's own settings are, for as long as a plot is drawn."""
    from matplotlib import style

    ours = {
        "svg.hashsalt": "dsv4",
        "svg.fonttype": "none",
        "font.size": NORMAL,
        "text.color": INK,
        "text.parse_math": False,  # a phase may be named with dollar signs
    }
    with style.context(["default", ours]):
        yield


def loss(history: History) -> Figure:
    """Training loss, with spikes, rollbacks and anticipatory routing; KL to a teacher; validation and its baseline."""
    taught = [("KL to the teacher, nats per token", 1.7)] * bool(history.divergences)
    validation = [("Validation, bits per byte", 2.2)] * bool(history.validations)
    figure, (top, *below) = panels(history, ("Training loss, nats per token", 3.2), *taught, *validation)
    if taught:
        name = f"{history.divergences[-1]:.3f}"
        curves(below[0], history, Line(lambda step: step.get("distill_kl"), ORANGE, name), bottom=0)
    if validation:
        _validation(below[-1], history)
    spikes = [
        End(spike.tokens, spike.loss, "" if number else "spike", RED) for number, spike in enumerate(history.spikes)
    ]
    for stretch in history.undone:
        top.plot([step["tokens"] for step in stretch], [step["loss"] for step in stretch], color=RED, linewidth=1)
    for spike in history.spikes:
        heights = [spike.loss_before, spike.loss]
        top.plot([spike.tokens] * 2, heights, color=RED, linewidth=1, marker="x", markevery=[1], markersize=6, zorder=4)
    curves(top, history, Line(lambda step: step["loss"], BLUE, f"{history.steps[-1]['loss']:.3f}"), ends=spikes)
    for begin, stop in history.anticipatory:
        top.axvspan(begin, stop, color=BAND, linewidth=0, zorder=0)
    for begin, stop in history.anticipatory[:1]:
        late = begin > 0.8 * history.tokens
        top.annotate(
            "anticipatory routing", (stop if late else begin, 1), xycoords=top.get_xaxis_transform(),
            xytext=(-3 if late else 3, -4), textcoords="offset points", color=BLUE, fontsize=SMALL, va="top",
            ha="right" if late else "left",
        )  # fmt: skip
    return figure


def _validation(axes: Axes, history: History) -> None:
    tokens = [record["tokens"] for record in history.validations]
    bits = [record["bits_per_byte"] for record in history.validations]
    axes.plot(tokens, bits, color=BLUE, linewidth=1.7, marker="o", markersize=3.5, clip_on=False)
    ends = [End(tokens[-1], bits[-1], f"{bits[-1]:.3f}", BLUE)]
    for baseline in history.baselines:
        height = baseline["bits_per_byte"]
        axes.axhline(height, color=ORANGE, linewidth=1.2, linestyle=(0, (5, 3)))
        ends.append(End(history.tokens, height, f"{baseline['name']} {height:.3f}", ORANGE))
    name_ends(axes, ends)


def switches(history: History) -> Figure | None:
    """Loss around each change of phase, step by step, with a line fitted on either side."""
    from matplotlib.figure import Figure

    if not history.switches:
        return None
    columns = min(max(len(history.switches), 3), 5)
    rows = math.ceil(len(history.switches) / columns)
    figure = Figure(figsize=(WIDTH, 2.5 * rows), layout="constrained", facecolor="none")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, switch in zip(grid, history.switches, strict=False):
        _switch(axes, switch)
    for axes in grid[len(history.switches) :]:
        axes.set_axis_off()
    return figure


def _switch(axes: Axes, switch: Switch) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

    quiet(axes)
    before = [step["loss"] for step in switch.before.steps[-SWITCH_STEPS:]]
    after = [step["loss"] for step in switch.after.steps[:SWITCH_STEPS]]
    for first, losses, stop, course, color in (
        (-len(before), before, -min(FIT_STEPS, len(before)), switch.course_before, BLUE),
        (0, after, min(FIT_STEPS, len(after)), switch.course_after, ORANGE),
    ):
        places = [first + place + 0.5 for place in range(len(losses))]
        axes.plot(places, losses, color=color, linewidth=0.7, marker=".", markersize=4.5, alpha=0.7)
        axes.plot([0, stop], [course.height, course.height + course.slope * stop], color=color, linewidth=2.4, zorder=3)
    axes.axvline(0, color=MUTED, linewidth=0.7, linestyle=(0, (1, 3)))
    axes.set_xlim(-SWITCH_STEPS, SWITCH_STEPS)
    axes.xaxis.set_major_locator(FixedLocator([-SWITCH_STEPS, 0, SWITCH_STEPS]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda place, _: f"{place:+.0f}" if place else "switch"))
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    names = f"{switch.before.phase.name}\nto {switch.after.phase.name}"
    axes.set_title(names, loc="left", color=INK, fontsize=NORMAL, fontweight="bold")
    scatter = "unknown" if switch.scatter is None else f"{switch.scatter:.3f}"
    axes.set_xlabel(f"jump {switch.jump:+.3f}\nscatter {scatter}", color=MUTED, fontsize=SMALL)


def schedule(history: History) -> Figure:
    """Learning rate, batch and MTP weight."""
    figure, (rate, batch, weight) = panels(
        history, ("Learning rate", 1.7), ("Tokens of a step", 1.1), ("Weight of the MTP loss", 1.1)
    )
    trains_all = {phase.name for phase in history.recipe.phases if phase.train == "all"}

    def main(name: str) -> Callable[[Record], float | None]:
        return lambda step: step[name] if step["phase"] in trains_all else None

    def warm_up(step: Record) -> float | None:
        return None if step["phase"] in trains_all else step["lr"]

    lines = (Line(main("lr"), BLUE, noisy=False), Line(warm_up, ORANGE, "indexer", noisy=False))
    curves(rate, history, *lines, bottom=0)
    curves(batch, history, Line(lambda step: step["batch_tokens"], BLUE, noisy=False, stepped=True), bottom=0)
    curves(weight, history, Line(main("mtp_weight"), BLUE, noisy=False, stepped=True), bottom=0)
    return figure


def gradients(history: History) -> Figure:
    """Norms of the gradients before clipping."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    figure, (axes,) = panels(history, ("Gradient norm before clipping", 2.6))
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    clip = history.recipe.optimizer.clip_norm
    axes.axhline(clip, color=MUTED, linewidth=1, linestyle=(0, (5, 3)))
    curves(
        axes, history,
        Line(lambda step: step["grad_norm"] or None, BLUE, "model"),
        Line(lambda step: step["indexer_grad_norm"] or None, ORANGE, "indexer"),
        ends=[End(history.tokens, clip, f"clipped above {clip:g}", MUTED)],
    )  # fmt: skip
    return figure


def experts(history: History) -> Figure | None:
    """Most loaded expert over the mean, by layer and tokens."""
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.ticker import MaxNLocator

    layers = len(history.expert_loads)
    if layers == 0:
        return None
    height = max(1.6, min(4.5, 0.26 * layers))
    figure, (axes,) = panels(history, ("Most loaded expert over the mean, by layer", height))
    edges, loads = _columns(history, max(1, HEAT_CELLS // layers))
    mesh = axes.pcolormesh(
        edges, [layer - 0.5 for layer in range(layers + 1)], loads, edgecolors="face", linewidth=0.4,
        cmap=ListedColormap(HEAT), norm=BoundaryNorm([*HEAT_LEVELS, HEAT_LEVELS[-1] + 1], len(HEAT)),
    )  # fmt: skip
    axes.set_ylim(layers - 0.5, -0.5)
    axes.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.grid(False)
    key = figure.colorbar(mesh, ax=axes, pad=0.015, aspect=14, spacing="uniform", ticks=HEAT_LEVELS)
    key.minorticks_off()
    key.ax.set_facecolor("none")
    key.ax.tick_params(length=0, labelsize=SMALL, colors=MUTED)
    key.ax.set_yticklabels([f"{level:g}" for level in HEAT_LEVELS])
    key.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    return figure


def _columns(history: History, most: int) -> tuple[list[int], list[list[float]]]:
    """Average the loads of neighbouring steps into at most that many columns: their edges, and rows of loads."""
    group = math.ceil(len(history.steps) / most)
    firsts = range(0, len(history.steps), group)
    edges = [0, *(history.steps[first : first + group][-1]["tokens"] for first in firsts)]
    return edges, [[_mean(loads[first : first + group]) for first in firsts] for loads in history.expert_loads]


def _mean(values: Sequence[float | None]) -> float:
    """Mean of the known values; without any, the gap that a plot leaves empty."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else math.nan


def indexer(history: History) -> Figure | None:
    """How much of the attention the indexer has learnt: captured KL and recall."""
    captured = [step["indexer_captured"] for step in history.steps if step["indexer_captured"] is not None]
    if not captured:
        return None
    figure, (axes,) = panels(history, ("The indexer beside the attention it picks for", 2.4))
    curves(
        axes, history,
        Line(lambda step: step["indexer_captured"], BLUE, "captured"),
        Line(lambda step: step["indexer_recall"], ORANGE, "recall"),
        bottom=min(0, *captured), top=1,
    )  # fmt: skip
    return figure


def speed(history: History) -> Figure:
    """Tokens per second, share of the machine's FLOP/s, and memory."""
    figure, (rate, share, memory) = panels(
        history,
        ("Tokens per second", 1.5),
        ("Share of the machine's matrix-product rate, %", 1.3),
        ("Memory, GiB", 1.1),
    )
    curves(rate, history, Line(lambda step: step["tokens_per_second"], BLUE), bottom=0)
    curves(share, history, Line(lambda step: 100 * step["flops_utilisation"], BLUE), bottom=0)
    curves(memory, history, Line(lambda step: step["memory_bytes"] / 2**30, BLUE, noisy=False, stepped=True), bottom=0)
    return figure
