"""Read a JSON object strictly and collect everything that is wrong with it, to report it all at once."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection, Mapping
from typing import TypeVar

T = TypeVar("T")


class Reader:
    """Reads named fields of one JSON object; a bad field becomes a line in ``problems`` and reads as None."""

    def __init__(self, data: Mapping[str, object], prefix: str = "") -> None:
        self.data = data
        self.prefix = prefix  # of field names in messages, for example "rope_scaling."
        self.problems: list[str] = []

    def check_names(self, known: Collection[str], optional: Collection[str] = ()) -> None:
        """Report unknown names, each with the nearest known one, and missing names."""
        for name in self.data:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                self.problems.append(f"unknown field {self.prefix}{name}{hint}")
        for name in known:
            if name not in self.data and name not in optional:
                self.problems.append(f"missing field {self.prefix}{name}")

    def constant(self, name: str, expected: object) -> None:
        """Report a field that is present and is not what this architecture fixes it to."""
        if name in self.data and not _same(self.data[name], expected):
            self.problem(name, f"{expected!r}")

    def integer(self, name: str) -> int | None:
        value = self.data.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return value
        return self._wrong(name, "an integer, 0 or more")

    def number(self, name: str) -> float | None:
        value = self.data.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0:
            return value
        return self._wrong(name, "a finite number, 0 or more")

    def boolean(self, name: str) -> bool | None:
        value = self.data.get(name)
        return value if isinstance(value, bool) else self._wrong(name, "true or false")

    def string(self, name: str) -> str | None:
        value = self.data.get(name)
        return value if isinstance(value, str) else self._wrong(name, "a string")

    def sequence(self, name: str) -> list[object] | None:
        value = self.data.get(name)
        return list(value) if isinstance(value, (list, tuple)) else self._wrong(name, "a list")

    def nested(self, name: str) -> Reader | None:
        """Open a field that is itself an object. Its problems are its own until ``absorb``."""
        value = self.data.get(name)
        if isinstance(value, Mapping):
            return Reader(value, prefix=f"{self.prefix}{name}.")
        return self._wrong(name, "an object")

    def absorb(self, other: Reader) -> None:
        self.problems.extend(other.problems)

    def problem(self, name: str, expected: str) -> None:
        """Add a line: field, value, expected."""
        self.problems.append(f"{self.prefix}{name} is {self.data.get(name)!r}; expected {expected}")

    def build(self, make: Callable[..., T], **fields: object) -> T | None:
        """Call ``make`` if every field was read; each line of its ValueError becomes a problem."""
        if any(value is None for value in fields.values()):
            return None
        try:
            return make(**fields)
        except ValueError as error:
            self.problems.extend(str(error).splitlines())
            return None

    def finish(self, title: str, result: T | None) -> T:
        """Return the result, or raise one ValueError that lists every problem."""
        if self.problems:
            lines = "".join(f"\n  - {problem}" for problem in self.problems)
            count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
            raise ValueError(f"{title} has {count}:{lines}")
        assert result is not None, "no problem was reported, yet nothing was built"
        return result

    def _wrong(self, name: str, expected: str) -> None:
        if name in self.data:  # a missing field is reported once, by check_names
            self.problem(name, expected)


def _same(value: object, expected: object) -> bool:
    """Equality that keeps true apart from 1, and lets 0 stand for 0.0."""
    return value == expected and isinstance(value, bool) == isinstance(expected, bool)
