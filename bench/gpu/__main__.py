"""Time the kernels at the shapes of Flash and Pro, against what this device can do and against their twins.

    python -m bench.gpu [--only ROOM ...] [--results FILE] [--plot FILE]

Ceilings are measured first: a copy, and a bfloat16 product. Each case is also compared with its portable twin.
"""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console

from bench.gpu.case import Case
from bench.gpu.measure import Ceilings, ceilings, check, free, measure
from dsv4.cli.bench_setup import save
from dsv4.cli.plot import COLORS, check_plot, new_figure, save_figure
from dsv4.config.files import write_then_rename
from dsv4.device import accelerator, name_of

ROOMS = (
    "attend", "paged", "index", "compress", "compress_entries", "compress_paged", "mhc", "experts", "linear", "lowbit",
    "rmsnorm", "rope", "route", "cross_entropy", "vocabulary_kl", "indexer_kl", "orthogonalize",
)  # fmt: skip
RESULTS = Path(__file__).parents[1] / "results"

console = Console(highlight=False, soft_wrap=True)


def main(only: tuple[str, ...] = ROOMS, results: Path = RESULTS / "gpu.json", plot: Path = RESULTS / "gpu.svg") -> None:
    """Time the kernels of some rooms, print and keep what was found.

    Args:
        only: rooms whose kernels are timed.
        results: where the figures are kept.
        plot: where their picture is kept.
    """
    device = accelerator()
    if device is None:
        sys.exit("no accelerator here; expected one, for on a CPU these kernels run in an interpreter")
    if unknown := sorted(set(only) - set(ROOMS)):
        sys.exit(f"--only has {', '.join(unknown)}; expected rooms among {', '.join(ROOMS)}")
    check_plot(plot)
    limits = ceilings(device)
    free()
    console.print(
        f"{name_of(device)}, torch {torch.__version__}: copies {limits.bytes_per_s / 1e12:.2f} TB/s, bfloat16 products "
        f"{limits.flops_per_s / 1e12:,.0f} TFLOP/s"
    )
    found = []
    for case in cases(only):
        found.append(measure(case, limits, device) | check(case, device))
        console.print(line(found[-1]))
        keep(results, device, limits, found)
    draw(plot, found, name_of(device))
    missed = [one for one in found if one["mark"] and one["share"] < one["mark"]]
    console.print(f"{len(found) - len(missed)} of {len(found)} at their marks or without one; {results} and {plot}")


def cases(rooms: tuple[str, ...]) -> list[Case]:
    """The cases of some rooms."""
    return [case for room in rooms for case in import_module(f"bench.gpu.{room}").cases()]


def line(one: dict[str, Any]) -> str:
    """One case in words."""
    rates = f"{one['num_bytes'] / one['seconds'] / 1e12:.2f} TB/s, {one['flops'] / one['seconds'] / 1e12:.0f} TFLOP/s"
    mark = f" (mark {one['mark']:.0%})" if one["mark"] else ""
    twins = "; ".join(f"{name} {against(taken, one['seconds'])}" for name, taken in one["twins"].items())
    error = "not compared" if one["error"] is None else f"error {one['error']:.1e}"
    same = "" if one["same_bits"] else ", NOT THE SAME BITS TWICE"
    return (
        f"{one['kernel']}, {one['shape']}: {1e6 * one['seconds']:,.1f} us, {rates}, {one['share']:.0%} of the ceiling "
        f"of {one['bound']}{mark}; {twins or 'no twin'}; {error}{same}"
    )


def against(taken: float | str, own: float) -> str:
    """A twin's time as a multiple of one's own, or why it has none."""
    return taken if isinstance(taken, str) else f"{taken / own:.1f}x"


def keep(path: Path, device: torch.device, limits: Ceilings, found: list[dict[str, Any]]) -> None:
    """Keep what has been found so far."""
    save(path, {
        "command": "make bench-gpu", "device": name_of(device), "date": datetime.now(UTC).date().isoformat(),
        "torch": torch.__version__, "triton": version("triton"), **limits._asdict(), "cases": found,
    })  # fmt: skip


def draw(path: Path, found: list[dict[str, Any]], device: str) -> None:
    """Draw the share of its ceiling that each case reaches, and its mark."""
    figure = new_figure()
    figure.set_size_inches(9, 1 + 0.22 * len(found))
    axes = figure.subplots()
    places = range(len(found), 0, -1)
    axes.barh(places, [100 * one["share"] for one in found], height=0.7, color=COLORS["V4-Pro"])
    for place, one in zip(places, found, strict=True):
        if one["mark"]:
            axes.plot([100 * one["mark"]] * 2, [place - 0.45, place + 0.45], color=COLORS["V4-Flash"])
    axes.set_yticks(places, [f"{one['kernel']}, {one['shape']}" for one in found], fontsize=7)
    axes.set_xlabel(f"per cent of what {device} can do in bytes or operations; orange: the mark")
    axes.margins(y=0.01)
    write_then_rename(path, lambda partial: save_figure(figure, partial, path.suffix.removeprefix(".")))


if __name__ == "__main__":
    tyro.cli(main)
