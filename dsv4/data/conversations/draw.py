"""Choices of one conversation, and on which side of the split its facts lie. No torch.

A fact is what a held-out conversation asks and no training conversation may have shown: a pair of numbers, a name, the
name of a tool. Its side follows from a hash of it alone, so that the same fact is on the same side in every
conversation.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from typing import TypeVar

from dsv4.data.conversations.words import REAL, words
from dsv4.data.split import Split

T = TypeVar("T")

MOST_DRAWS = 10_000  # for one fact

ONSETS = words("b br c d dr f g gr h j k l m n p r s st t tr v z")
VOWELS = words("a e i o u ai ea io")
ENDS = ("", "", *"lmnrsx")


class Draw:
    """Draws choices, all of them a function of (side, index).

    held_out: the share of facts that lie on the side ``validation``.
    """

    def __init__(self, side: Split, index: int, held_out: float) -> None:
        # random() is the one method whose sequence Python promises to keep, and so is seeding by text.
        self._random = random.Random(f"{side} {index}").random
        self._side = side
        self._held_out = held_out

    @property
    def is_training(self) -> bool:
        return self._side == "train"

    def share(self) -> float:
        """A number 0 <= number < 1."""
        return self._random()

    def below(self, count: int) -> int:
        """A number 0 <= number < count."""
        return int(self._random() * count)

    def between(self, low: int, high: int) -> int:
        """A number low <= number <= high."""
        return low + self.below(high - low + 1)

    def chance(self, share: float) -> bool:
        """True in this share of the cases."""
        return self._random() < share

    def choice(self, items: Sequence[T]) -> T:
        return items[self.below(len(items))]

    def some(self, items: Sequence[T], count: int) -> list[T]:
        """``count`` different ones, in a random order."""
        left = list(items)
        return [left.pop(self.below(len(left))) for _ in range(count)]

    def fact(self, make: Callable[[], T], key: Callable[[T], str]) -> T:
        """Draw until the fact, written as ``key`` does, lies on this conversation's side.

        Raises ``ValueError`` where none seems to.
        """
        made = make()
        for _ in range(MOST_DRAWS):
            if side_of(key(made), self._held_out) == self._side:
                return made
            made = make()
        raise ValueError(
            f"the share of held-out facts is {self._held_out}; expected one that leaves facts like {key(made)!r} on "
            f"the side {self._side}"
        )

    def name(self) -> str:
        """A made-up word of this side, such as ``velora``: nobody has seen it, so it can only be copied."""
        while (name := self.fact(self._syllables, str)) in REAL:
            pass
        return name

    def number(self) -> str:
        """Up to three digits, now and then as a price or a time, or with zeros before it."""
        if self.chance(0.6):
            return str(self.below(1000))
        form = self.choice(("{:03d}", "{:02d}", "{}.50", "{:02d}:45"))
        return form.format(self.below(100))

    def called(self, words: Sequence[str], made_up: float) -> str:
        """A made-up word in this share of the cases, otherwise one of these words.

        Real words are not held out, as what is never written cannot be learnt to be written: validation has none.
        """
        return self.name() if self.chance(made_up) or not self.is_training else self.choice(words)

    def _syllables(self) -> str:
        count = 2 + self.chance(0.4)
        return "".join(self.choice(ONSETS) + self.choice(VOWELS) for _ in range(count)) + self.choice(ENDS)


def side_of(fact: str, held_out: float) -> Split:
    """The side of a fact, by its hash."""
    digest = hashlib.sha256(f"fact {fact}".encode()).digest()
    return "validation" if int.from_bytes(digest[:8], "big") / 2**64 < held_out else "train"
