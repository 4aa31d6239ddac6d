"""Numbers of a run as people read them."""

from __future__ import annotations


def count(value: float) -> str:
    """Write 1_500_000 as 1.5 M, 16384 as 16.4 K, 32e12 as 32 T; three figures at most."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= size * 0.9995:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """Write 75 as 1 min 15 s, 5000 as 1 h 23 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.3g} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


def gibibytes(value: float) -> str:
    """Write bytes in GiB, MiB below one."""
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def plural(number: int, noun: str) -> str:
    """Write 1 step, 2 steps, 1,000 steps."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
