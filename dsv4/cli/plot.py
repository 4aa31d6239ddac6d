"""Draw the comparison of ``dsv4 efficiency``: two panels, a line per model, each named at its end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dsv4.accounting.efficiency import Row
from dsv4.cli.format import tokens
from dsv4.config.files import write_then_rename

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = {"V3.2": "#8a8f98", "V4-Pro": "#1f4e9c", "V4-Flash": "#e07b39"}
TEXT, GRID = "#30343b", "#e4e6ea"
LABEL_GAP = 0.055  # least distance of two labels, as a share of the axis


def check_plot(path: Path) -> None:
    """Refuse, before any work is done, what cannot be drawn."""
    if path.suffix not in (".svg", ".png"):
        raise ValueError(f"--plot is {path}; expected a name that ends in .svg or .png")
    if not path.parent.is_dir():
        raise ValueError(f"--plot is {path}; expected its directory to exist")
    new_figure()


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw the rows into an .svg or .png file, written beside and renamed. The same rows give the same bytes."""
    check_plot(path)
    figure = new_figure()
    left, right = figure.subplots(1, 2)
    contexts = [row.context for row in rows]
    last = rows[-1]
    _panel(
        left,
        "FLOPs of one decoded token",
        "TFLOP, FP8-equivalent",
        contexts,
        {
            "V3.2": [row.v32.flops / 1e12 for row in rows],
            "V4-Pro": [row.pro.flops / 1e12 for row in rows],
            "V4-Flash": [row.flash.flops / 1e12 for row in rows],
        },
        {"V4-Pro": last.flops_share(last.pro), "V4-Flash": last.flops_share(last.flash)},
    )
    _panel(
        right,
        "Key-value cache of one sequence",
        "GiB",
        contexts,
        {
            "V3.2": [row.v32.kv_bytes / 2**30 for row in rows],
            "V4-Pro": [row.pro.kv_bytes / 2**30 for row in rows],
            "V4-Flash": [row.flash.kv_bytes / 2**30 for row in rows],
        },
        {"V4-Pro": last.kv_share(last.pro), "V4-Flash": last.kv_share(last.flash)},
    )
    write_then_rename(path, lambda partial: save_figure(figure, partial, path.suffix.removeprefix(".")))


def _panel(
    axes: Axes,
    title: str,
    unit: str,
    contexts: list[int],
    lines: dict[str, list[float]],
    shares: dict[str, float],
) -> None:
    top = max(max(values) for values in lines.values())
    axes.set_xlim(0, contexts[-1])
    axes.set_ylim(0, top * 1.05)
    label_heights = _spread({name: values[-1] for name, values in lines.items()}, LABEL_GAP * top * 1.05)
    for name, values in lines.items():
        axes.plot(contexts, values, color=COLORS[name], linewidth=2.2, solid_capstyle="round", clip_on=False)
        share = f"  {shares[name]:.0%}" if name in shares else ""
        axes.annotate(
            f"{name}{share}",
            (contexts[-1], label_heights[name]),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            color=COLORS[name],
            fontweight="bold",
            annotation_clip=False,
        )
    axes.set_title(title, loc="left", color=TEXT, fontsize=12, fontweight="bold", pad=22)
    axes.text(0, 1.03, unit, transform=axes.transAxes, color=TEXT, fontsize=9)
    marks = [contexts[-1] * quarter // 4 for quarter in range(5)]
    axes.set_xticks(marks, ["0", *(tokens(mark) for mark in marks[1:])])
    axes.set_xlabel("tokens of context", color=TEXT, fontsize=9)
    axes.tick_params(colors=TEXT, labelsize=9, length=0, pad=6)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(TEXT)


def _spread(heights: dict[str, float], gap: float) -> dict[str, float]:
    """Move labels up, lowest first, until neighbours are a gap apart."""
    result: dict[str, float] = {}
    floor = float("-inf")
    for name, height in sorted(heights.items(), key=lambda item: item[1]):
        result[name] = max(height, floor)
        floor = result[name] + gap
    return result


def new_figure() -> Figure:
    """Return an empty figure; a ValueError names the extra if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise ValueError(
            "--plot needs matplotlib, which is not installed; expected: pip install 'dsv4[plot]'"
        ) from error
    layout = ConstrainedLayoutEngine(w_pad=0.2, h_pad=0.2)  # inches
    return Figure(figsize=(11, 4.4), layout=layout, facecolor="white")


def save_figure(figure: Figure, path: Path, suffix: str) -> None:
    """Write a figure as ``svg`` or ``png``, without the date."""
    from matplotlib import rc_context

    with rc_context({"svg.hashsalt": "dsv4", "svg.fonttype": "none"}):
        metadata = {"Date": None} if suffix == "svg" else {"Software": None}
        figure.savefig(path, format=suffix, dpi=160, metadata=metadata)
