"""How many requests a server takes at once, of all clients and of each."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from dsv4.serve.errors import ApiError

SMOOTHING = 0.1  # weight of the newest request in the mean duration
PROMISE_S = 5.0  # a place is kept for so long for a request that was let in and has not begun


class Admission:
    """Counts requests from when they come to when they end.

    max_at_once: running and waiting, of all clients. max_per_key: of one, 0 for no limit.
    """

    def __init__(self, max_at_once: int, max_per_key: int) -> None:
        self._max_at_once, self._max_per_key = max_at_once, max_per_key
        self._by_key: Counter[str] = Counter()
        self._promised: list[tuple[float, str]] = []  # until when, and the key
        self.num_now = 0
        self.mean_s = 1.0
        """How long a request takes, smoothed."""

    def check(self, key: str, num: int = 1) -> None:
        """Keep places for ``num`` more requests; raise an ``ApiError`` of 429 if they would be too many."""
        now = time.monotonic()
        self._promised = [(until, owner) for until, owner in self._promised if until > now]
        num_now = self.num_now + len(self._promised)
        if num_now + num > self._max_at_once:
            raise self._refusal(f"{num_now} requests are running or waiting, which is the limit; try again later")
        of_key = self._by_key[key] + sum(owner == key for _, owner in self._promised)
        if self._max_per_key and of_key + num > self._max_per_key:
            raise self._refusal(
                f"{of_key} requests of this key are running or waiting; expected at most {self._max_per_key} at once"
            )
        self._promised += [(now + PROMISE_S, key)] * num

    @contextmanager
    def enter(self, key: str, *, is_let_in: bool = False) -> Iterator[None]:
        """Count a request until it ends; one that was let in before is not refused any more."""
        if not self._redeem(key) and not is_let_in:
            self.check(key)
            self._redeem(key)
        self.num_now += 1
        self._by_key[key] += 1
        try:
            yield
        finally:
            self.num_now -= 1
            self._by_key[key] -= 1
            if not self._by_key[key]:
                del self._by_key[key]

    def _redeem(self, key: str) -> bool:
        """Take a place that is kept for this key, if there is one."""
        found = next((i for i, (_, owner) in enumerate(self._promised) if owner == key), None)
        if found is not None:
            del self._promised[found]
        return found is not None

    def took(self, seconds: float) -> None:
        """Note how long a request took."""
        self.mean_s += SMOOTHING * (seconds - self.mean_s)

    def _refusal(self, message: str) -> ApiError:
        return ApiError(429, message, code="rate_limit_exceeded", retry_after_s=max(1, round(self.mean_s)))
