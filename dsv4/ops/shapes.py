"""Shape checks at the door of an operation, in the letters of NOTATION.md."""

from __future__ import annotations

from functools import cache

import torch

from dsv4.device import is_accelerator


class Shapes:
    """Sizes of shape letters, bound by the first tensor that shows them and enforced on the rest."""

    def __init__(self) -> None:
        self._sizes: dict[str, tuple[int, str]] = {}

    def check(self, name: str, tensor: torch.Tensor, letters: str) -> None:
        """Raise ``ValueError`` unless ``tensor`` has the shape ``letters``, such as ``"B T H K"``.

        A letter may be a number (``"2"``). A leading ``...`` allows any leading dimensions.
        """
        wanted, is_open = _parse(letters)
        shape = tensor.shape
        if is_open and len(shape) >= len(wanted):
            shape = shape[len(shape) - len(wanted) :]
        fits = len(shape) == len(wanted)
        if fits:
            for letter, size in zip(wanted, shape, strict=True):
                known = letter if isinstance(letter, int) else self._sizes.setdefault(letter, (size, name))[0]
                fits = fits and known == size
        if not fits:
            known = ", ".join(
                f"{letter} = {self._sizes[letter][0]} (from {self._sizes[letter][1]})"
                for letter in wanted
                if letter in self._sizes and self._sizes[letter][1] != name
            )
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}; expected [{letters.replace(' ', ', ')}]"
                + (f" with {known}" if known else "")
            )

    def size(self, letter: str) -> int:
        """Return the size bound to ``letter``."""
        return self._sizes[letter][0]


@cache
def _parse(letters: str) -> tuple[tuple[str | int, ...], bool]:
    """The letters and numbers of a shape, and whether other dimensions may come before them."""
    wanted = letters.split()
    is_open = wanted[:1] == ["..."]
    return tuple(int(x) if x.isdigit() else x for x in wanted[is_open:]), is_open


def check_integer(name: str, tensor: torch.Tensor) -> None:
    """Raise ``ValueError`` unless ``tensor`` holds int64."""
    if tensor.dtype != torch.int64:
        raise ValueError(f"{name} has dtype {tensor.dtype}; expected torch.int64")


def check_floating(name: str, tensor: torch.Tensor) -> None:
    """Raise ``ValueError`` unless ``tensor`` holds floating-point numbers."""
    if not tensor.dtype.is_floating_point:
        raise ValueError(f"{name} has dtype {tensor.dtype}; expected a floating-point dtype")


def check_range(name: str, ids: torch.Tensor, limit: int, expected: str) -> None:
    """Raise ``ValueError``, which says what is expected, unless all of ``ids`` are at least 0 and below ``limit``.

    Those on an accelerator are taken as they are: to look at them would make the CPU wait for it.
    """
    if is_accelerator(ids.device):
        return
    lowest, highest = int(ids.min()), int(ids.max())
    if lowest < 0 or highest >= limit:
        raise ValueError(f"{name} holds {lowest if lowest < 0 else highest}; expected {expected}")
