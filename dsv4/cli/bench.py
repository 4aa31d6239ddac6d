"""``dsv4 bench``: measurements of the engine on this machine, one verb each."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import tyro

from dsv4.cli.bench_cache import bench_cache
from dsv4.cli.bench_context import bench_context
from dsv4.cli.bench_engine import bench_engine
from dsv4.cli.bench_serve import bench_serve

BENCHES: dict[str, Callable[..., None]] = {
    "engine": bench_engine,
    "cache": bench_cache,
    "context": bench_context,
    "serve": bench_serve,
}


def bench(argv: Sequence[str]) -> None:
    """Measure engine (speed and memory), cache (prefixes on disk), context (cost of length), serve (what HTTP adds)."""
    tyro.extras.subcommand_cli_from_dict(
        BENCHES,
        prog="dsv4 bench",
        description="Measure the engine on this machine.",
        args=list(argv),
        config=(tyro.conf.FlagCreatePairsOff,),
    )
