"""Sums and differences to ask for, with the digits spelled out as reasoning.

Held out are pairs of numbers, whatever their order; of the tables of one digit, on which everything else stands, none.
"""

from __future__ import annotations

from typing import NamedTuple

from dsv4.data.conversations.draw import Draw

SIGNS = {"+": "plus", "-": "minus"}
TABLE = 10  # numbers below it are the tables, which are never held out
TABLES, EASY = 0.15, 0.35  # shares of sums of two numbers of one digit, and of one such number; the others have none


class Sum(NamedTuple):
    """left and right of a sign; a difference is not below zero."""

    left: int
    sign: str
    right: int

    @property
    def text(self) -> str:
        return f"{self.left} {self.sign} {self.right}"

    @property
    def value(self) -> int:
        return self.left + self.right if self.sign == "+" else self.left - self.right

    @property
    def is_table(self) -> bool:
        return max(self.left, self.right) < TABLE

    @property
    def fact(self) -> str:
        """The same for both orders."""
        low, high = sorted((self.left, self.right))
        return f"{low} {self.sign} {high}"


def draw_sum(draw: Draw) -> Sum:
    """A sum of two numbers of one or two digits. Tables are asked in training alone."""
    kind = draw.share()
    if draw.is_training and kind < TABLES:
        return _ordered(draw.below(TABLE), draw.choice("+-"), draw.below(TABLE))
    if kind < TABLES + EASY:
        return draw.fact(lambda: _draw(draw, draw.below(TABLE)), lambda made: made.fact)
    return draw.fact(lambda: _draw(draw, draw.between(TABLE, 99)), lambda made: made.fact)


def question(draw: Draw, asked: Sum) -> str:
    """One of the ways to ask for it."""
    text, words = asked.text, f"{asked.left} {SIGNS[asked.sign]} {asked.right}"
    if draw.chance(0.5):
        return text
    return draw.choice(
        (f"What is {text}?", f"{text} = ?", f"How much is {text}?", f"Compute {text}.", f"What is {words}?", words)
    )


def working(asked: Sum) -> str:
    """The sum again, then its digits, one step after the other."""
    return f"{asked.text}: {_addition(asked) if asked.sign == '+' else _subtraction(asked)}"


def _draw(draw: Draw, other: int) -> Sum:
    two = draw.between(TABLE, 99)
    pair = (two, other) if draw.chance(0.5) else (other, two)
    return _ordered(pair[0], draw.choice("+-"), pair[1])


def _ordered(left: int, sign: str, right: int) -> Sum:
    return Sum(max(left, right), sign, min(left, right)) if sign == "-" else Sum(left, sign, right)


def _addition(asked: Sum) -> str:
    tens, ones = asked.left // 10 + asked.right // 10, asked.left % 10 + asked.right % 10
    steps = f"{asked.left % 10} + {asked.right % 10} = {ones}."
    if asked.is_table:
        return steps
    carried = f" + {ones // 10}" if ones >= 10 else ""
    return f"{steps} {asked.left // 10} + {asked.right // 10}{carried} = {tens + ones // 10}."


def _subtraction(asked: Sum) -> str:
    upper, lower = asked.left % 10, asked.right % 10
    borrows = upper < lower
    steps = f"{upper + 10 * borrows} - {lower} = {upper + 10 * borrows - lower}."
    if asked.is_table:
        return steps
    borrowed = " - 1" if borrows else ""
    left = asked.left // 10 - asked.right // 10 - borrows
    return f"{steps} {asked.left // 10} - {asked.right // 10}{borrowed} = {left}."
