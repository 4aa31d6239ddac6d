"""What a config class says of a value that cannot be: the field's name, the value, and what was expected.

Each function returns a list of at most one problem, so that a class can collect them and ``refuse`` all at once. Values
may come from a user's JSON, so a value of the wrong type is such a problem too, and so are NaN and infinities.
"""

from __future__ import annotations

import math
from typing import TypeGuard


def refuse(problems: list[str]) -> None:
    """Raise one ValueError, a line per problem."""
    if problems:
        raise ValueError("\n".join(problems))


def below(name: str, value: object, least: int) -> list[str]:
    """A whole number of at least ``least`` is expected."""
    if is_whole(value) and value >= least:
        return []
    return [f"{name} is {value!r}; expected a whole number of at least {least}"]


def outside_whole(name: str, value: object, low: int, high: int) -> list[str]:
    """A whole number from ``low`` to ``high`` is expected."""
    if is_whole(value) and low <= value <= high:
        return []
    return [f"{name} is {value!r}; expected a whole number from {low} to {high}"]


def outside(name: str, value: object, low: float, high: float) -> list[str]:
    """A number from ``low`` to ``high`` is expected."""
    if is_number(value) and low <= value <= high:
        return []
    return [f"{name} is {value!r}; expected {low:g} to {high:g}"]


def not_one_of(name: str, value: object, known: tuple[str, ...]) -> list[str]:
    """One of some strings is expected."""
    return [] if value in known else [f"{name} is {value!r}; expected one of {', '.join(known)}"]


def not_flag(name: str, value: object) -> list[str]:
    """True or False is expected."""
    return [] if isinstance(value, bool) else [f"{name} is {value!r}; expected True or False"]


def not_path(name: str, value: object) -> list[str]:
    """A path, as a string that is not empty, or None is expected."""
    if value is None or (isinstance(value, str) and value):
        return []
    return [f"{name} is {value!r}; expected a path or None"]


def is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
