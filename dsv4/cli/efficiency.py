"""``dsv4 efficiency``: V4 against V3.2 over the length of the context (figure 1, right, of the report)."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from dsv4.accounting.cache import gqa_bytes_per_token, state_bytes
from dsv4.accounting.efficiency import CACHE_FORMAT, Row, rows
from dsv4.cli.format import flops, gibibytes, tokens
from dsv4.cli.plot import check_plot, draw
from dsv4.config.presets import flash, pro


def efficiency(
    plot: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Compare V4 with V3.2: FLOPs of one decoded token and bytes of cache, 4K to 1M tokens of context.

    Args:
        plot: also draw the two comparisons into this .svg or .png file.
        as_json: print one JSON list instead of a table.
    """
    if plot is not None:
        check_plot(plot)
    table = rows()
    if as_json:
        print(json.dumps([_to_json(row) for row in table], indent=2))
    else:
        _print(table)
    if plot is not None:
        draw(table, plot)


def _to_json(row: Row) -> dict[str, object]:
    result = dataclasses.asdict(row)
    for name, point in (("pro", row.pro), ("flash", row.flash)):
        result[name] |= {"flops_share": row.flops_share(point), "kv_share": row.kv_share(point)}
    return result


def _print(table: tuple[Row, ...]) -> None:
    console = Console(highlight=False)
    console.print(_grid("FLOPs of one decoded token, FP8-equivalent", [_flops_cells(row) for row in table]))
    console.print(_grid("Key-value cache of one sequence, entries", [_kv_cells(row) for row in table]))
    for name, config in (("V4-Pro", pro()), ("V4-Flash", flash())):
        packed = table[-1].pro.kv_bytes if name == "V4-Pro" else table[-1].flash.kv_bytes
        grouped = gqa_bytes_per_token(config.num_layers) * table[-1].context
        console.print(
            f"{name}: {packed / grouped:.1%} of a BF16 cache of grouped-query attention (8 heads of 128) at "
            f"{tokens(table[-1].context)}; every sequence also holds {gibibytes(state_bytes(config, CACHE_FORMAT))} "
            "of windows and tails."
        )


def _grid(title: str, cells: list[tuple[str, ...]]) -> Table:
    grid = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("context", "V3.2", "V4-Pro", "", "V4-Flash", ""):
        grid.add_column(name, justify="right")
    for row in cells:
        grid.add_row(*row)
    return grid


def _flops_cells(row: Row) -> tuple[str, ...]:
    cells = [tokens(row.context), flops(row.v32.flops)]
    for point in (row.pro, row.flash):
        cells += [flops(point.flops), f"{row.flops_share(point):.0%}"]
    return tuple(cells)


def _kv_cells(row: Row) -> tuple[str, ...]:
    cells = [tokens(row.context), gibibytes(row.v32.kv_bytes)]
    for point in (row.pro, row.flash):
        cells += [gibibytes(point.kv_bytes), f"{row.kv_share(point):.0%}"]
    return tuple(cells)
