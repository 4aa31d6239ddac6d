"""Words to say again. Nothing teaches a model sooner to look at what it was told. Held out are the words."""

from __future__ import annotations

from typing import NamedTuple

from dsv4.data.conversations.draw import Draw
from dsv4.data.conversations.words import COMMON

NUMBERS = 0.2  # share of words
MADE_UP, CAPITAL = 0.4, 0.3  # shares of the others

ASKS = ("Repeat: {}", "Say: {}", "Repeat after me: {}", "Write: {}", "say {}")


class Echo(NamedTuple):
    question: str
    reason: str
    answer: str


def draw_echo(draw: Draw, most_words: int) -> Echo:
    """A question that only its own words answer."""
    text = " ".join(_word(draw) for _ in range(draw.between(1, most_words)))
    return Echo(draw.choice(ASKS).format(text), "I say it again.", text)


def _word(draw: Draw) -> str:
    if draw.chance(NUMBERS):
        return draw.fact(draw.number, lambda number: f"word {number}")
    word = draw.called(COMMON, MADE_UP)
    return word.capitalize() if draw.chance(CAPITAL) else word
