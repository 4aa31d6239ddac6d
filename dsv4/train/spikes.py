"""Loss spikes (report 4.2.3): a loss far above its smoothed course, measured in smoothed deviations."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass


@dataclass
class SpikeDetector:
    """Follows the loss with an exponential average of its value, its trend and its absolute deviation.

    The trend matters early on, when the loss falls fast and its average lags behind. Nothing is a spike before
    ``memory`` losses were seen, and for about as long again after a steep fall little is: what the trend missed counts
    as deviation. A spike is not taken into the averages.
    """

    deviations: float
    memory: int
    seen: int = 0
    level: float = 0.0
    trend: float = 0.0
    deviation: float = 0.0

    @property
    def expected(self) -> float:
        """The next loss by level and trend."""
        return self.level + self.trend

    def is_spike(self, loss: float) -> bool:
        """Say whether ``loss`` is a spike, and follow it if it is not. A loss that is not finite always is."""
        if not math.isfinite(loss):
            return True
        if self.seen == 0:
            self.level = loss
        elif self.seen >= self.memory and loss - self.expected > self.deviations * self.deviation:
            return True
        else:
            share = 2 / (1 + min(self.seen + 1, self.memory))  # the averages reach back to the start, or by memory
            off = loss - self.expected
            self.deviation += share * (abs(off) - self.deviation)
            level = self.expected + share * off
            self.trend += share * (level - self.level - self.trend)
            self.level = level
        self.seen += 1
        return False

    def state(self) -> dict[str, float]:
        return asdict(self)

    def load_state(self, state: dict[str, float]) -> None:
        for name in ("seen", "level", "trend", "deviation"):
            setattr(self, name, state[name])
