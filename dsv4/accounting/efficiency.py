"""DeepSeek-V4 against V3.2 over the length of the context: the numbers behind figure 1 (right) of the report.

FLOPs are those of one decoded token in FP8-equivalents. Cache bytes are those of the entries, which grow with
the context, in the ``packed`` format; rings and tails, which do not grow, are left out as in the report's
comparison and given apart by ``state_bytes``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dsv4.accounting import flops, v32
from dsv4.accounting.cache import CacheFormat, entry_bytes
from dsv4.accounting.cost import total_fp8_equivalent
from dsv4.config.model import ModelConfig
from dsv4.config.presets import flash, pro

CONTEXTS = tuple(2**power for power in range(12, 21))  # 4K to 1M tokens
CACHE_FORMAT: CacheFormat = "packed"


@dataclass(frozen=True, kw_only=True)
class Point:
    """What one decoded token costs at a context length."""

    flops: float  # FP8-equivalent
    kv_bytes: int  # entries of the whole context


@dataclass(frozen=True, kw_only=True)
class Row:
    """One context length."""

    context: int
    v32: Point
    pro: Point
    flash: Point

    def flops_share(self, point: Point) -> float:
        """Return a point's FLOPs as a share of V3.2's."""
        return point.flops / self.v32.flops

    def kv_share(self, point: Point) -> float:
        """Return a point's cache bytes as a share of V3.2's."""
        return point.kv_bytes / self.v32.kv_bytes


def rows(contexts: Sequence[int] = CONTEXTS) -> tuple[Row, ...]:
    """Compute a row for each context length."""
    pro_points, flash_points = _points(pro(), contexts), _points(flash(), contexts)
    old = v32.V32Config()
    result = []
    for index, context in enumerate(contexts):
        base = Point(
            flops=total_fp8_equivalent(v32.decode(old, context)), kv_bytes=context * v32.kv_bytes_per_token(old)
        )
        result.append(Row(context=context, v32=base, pro=pro_points[index], flash=flash_points[index]))
    return tuple(result)


def _points(config: ModelConfig, contexts: Sequence[int]) -> list[Point]:
    costs = flops.decode_each(config, contexts)
    return [
        Point(flops=total_fp8_equivalent(cost), kv_bytes=entry_bytes(config, CACHE_FORMAT, context))
        for cost, context in zip(costs, contexts, strict=True)
    ]
