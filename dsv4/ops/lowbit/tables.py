"""What codes stand for, and the least maximum by which a group of them is scaled."""

from __future__ import annotations

from typing import NamedTuple

ACTIVATION_GROUP = 128  # channels of an activation that share a scale
CACHE_GROUP = 64  # channels of a cache row that share one
FP4_GROUP = 32  # columns of a row that share a scale
BLOCK = 128  # rows, and columns, of a weight that share a scale in FP8
NAN_SCALE = 255  # of E8M0; the other codes are 2^(code - 127)


class Code(NamedTuple):
    """A signed code. values: by code, the sign aside; sign: its bit; floor: of a group's largest size.

    has_nan: whether a NaN is one in its own code. Else its whole group is, by the scale.
    """

    values: tuple[float, ...]
    sign: int
    floor: float
    has_nan: bool

    @property
    def largest(self) -> float:
        """The largest value."""
        return self.values[-1]


E4M3 = Code(
    (*(code * 2.0**-9 for code in range(8)), *((8 + code % 8) * 2.0 ** (code // 8 - 10) for code in range(8, 127))),
    sign=128,
    floor=1e-4,
    has_nan=True,
)
"""The size 127 is NaN."""
E2M1 = Code((0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0), sign=8, floor=6 * 2.0**-126, has_nan=False)
E4M3_KEY = E4M3._replace(floor=448 * 2.0**-126, has_nan=False)
"""As indexer keys have it: the floor is as low as E2M1's, so that it holds whatever that does."""
