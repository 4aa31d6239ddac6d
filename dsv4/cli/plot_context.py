"""Draw ``dsv4 bench context``: the rates of prefill and decoding from 0 on, and the cache, over the length."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv4.cli.format import tokens
from dsv4.cli.plot import COLORS, GRID, TEXT, check_plot, new_figure, save_figure
from dsv4.config.files import write_then_rename

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANELS = (
    ("prompt_tokens_per_s", "The whole prompt", "tokens per second", 1.0),
    ("decode_tokens_per_s", "Decoding", "tokens per second", 1.0),
    ("cache_used_bytes", "Cache of the sequence", "MiB", 2.0**-20),
)
LINES = (("lengths", "compressed", COLORS["V4-Pro"]), ("dense", "dense twin", COLORS["V3.2"]))


def draw_context(results: dict[str, Any], path: Path) -> None:
    """Draw the results into an .svg or .png file, written beside and renamed."""
    check_plot(path)
    figure = new_figure()
    for axes, (field, title, unit, scale) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        _panel(axes, results, field, title, unit, scale)
    figure.axes[0].legend(frameon=False, fontsize=9, labelcolor=TEXT)
    write_then_rename(path, lambda partial: save_figure(figure, partial, path.suffix.removeprefix(".")))


def _panel(axes: Axes, results: dict[str, Any], field: str, title: str, unit: str, scale: float) -> None:
    marks = [at["length"] for at in results["lengths"]]
    axes.set_xscale("log", base=2)
    for key, name, color in LINES:
        found = results[key]
        if found:
            values = [at[field] * scale for at in found]
            axes.plot([at["length"] for at in found], values, color=color, linewidth=2.2, marker="o", label=name)
    if field == "cache_used_bytes":
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.set_title(title, loc="left", color=TEXT, fontsize=12, fontweight="bold", pad=22)
    axes.text(0, 1.03, unit, transform=axes.transAxes, color=TEXT, fontsize=9)
    axes.set_xticks(marks, [tokens(mark) for mark in marks])
    axes.minorticks_off()
    axes.set_xlabel("tokens of context", color=TEXT, fontsize=9)
    axes.tick_params(colors=TEXT, labelsize=9, length=0, pad=6)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(TEXT)
