"""Numbers as people read them. GB is 1e9 bytes, GiB is 2**30."""

from __future__ import annotations


def decimal(value: float) -> str:
    """Write 284332240471 as 284.33 B, 9437184 as 9.44 M."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value:.0f}"


def flops(value: float) -> str:
    """Write FLOPs with the prefixes of the trade: 141.06 GFLOP."""
    for size, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if abs(value) >= size:
            return f"{value / size:.2f} {unit}FLOP"
    return f"{value:.0f} FLOP"


def gigabytes(value: float) -> str:
    """Write bytes in decimal units."""
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(value) >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value:.0f} B"


def gibibytes(value: float) -> str:
    """Write bytes in binary units, as memory is sold."""
    for power, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if abs(value) >= 2**power:
            return f"{value / 2**power:.2f} {unit}"
    return f"{value:.0f} B"


def tokens(value: int) -> str:
    """Write a context length: 4K, 1M, or the number itself."""
    for power, unit in ((20, "M"), (10, "K")):
        if value >= 2**power and value % 2**power == 0:
            return f"{value >> power}{unit}"
    return f"{value:,}"
