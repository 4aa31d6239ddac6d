"""Sums are what they say, and every step of the working is true."""

import re
from itertools import product

import pytest

from dsv4.data.conversations.arithmetic import EASY, TABLES, Sum, draw_sum, question, working
from dsv4.data.conversations.draw import Draw, side_of


def all_sums():
    for left, right in product(range(100), range(100)):
        yield Sum(left, "+", right)
        if left >= right:
            yield Sum(left, "-", right)


def steps(text):
    """The equations of a working."""
    return re.findall(r"(\d+(?: [-+] \d+)+) = (\d+)", text)


def test_every_step_of_every_working_is_true():
    for asked in all_sums():
        found = steps(working(asked))
        assert found, asked
        for left, right in found:
            assert eval(left) == int(right), (asked, left)


def test_the_steps_hold_the_value():
    """Its digits, in the order ones, then the rest; of a table the value itself."""
    for asked in all_sums():
        last = int(steps(working(asked))[-1][1])
        if len(steps(working(asked))) == 1:
            assert last == asked.value, asked
        else:
            ones = int(steps(working(asked))[0][1]) % 10
            assert 10 * last + ones == asked.value, asked


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        (Sum(47, "+", 38), "47 + 38: 7 + 8 = 15. 4 + 3 + 1 = 8."),
        (Sum(40, "+", 3), "40 + 3: 0 + 3 = 3. 4 + 0 = 4."),
        (Sum(3, "+", 4), "3 + 4: 3 + 4 = 7."),
        (Sum(52, "-", 38), "52 - 38: 12 - 8 = 4. 5 - 3 - 1 = 1."),
        (Sum(59, "-", 38), "59 - 38: 9 - 8 = 1. 5 - 3 = 2."),
    ],
)
def test_working_in_words(asked, wanted):
    assert working(asked) == wanted


def test_held_out_pairs_are_never_trained_on_in_either_order():
    for side, other in (("train", "validation"), ("validation", "train")):
        for index in range(800):
            asked = draw_sum(Draw(side, index, 0.3))
            swapped = Sum(asked.right, asked.sign, asked.left)
            assert swapped.fact == asked.fact
            if asked.is_table:
                assert side == "train"
            else:
                assert side_of(asked.fact, 0.3) == side != other


def test_tables_easy_ones_and_those_of_two_digits_have_their_shares():
    drawn = [draw_sum(Draw("train", index, 0.1)) for index in range(2000)]
    assert {asked.sign for asked in drawn} == {"+", "-"}
    assert all(asked.value >= 0 and max(asked.left, asked.right) < 100 for asked in drawn)
    tables = sum(asked.is_table for asked in drawn)
    hard = sum(min(asked.left, asked.right) >= 10 for asked in drawn)
    assert abs(tables - 2000 * TABLES) < 60
    assert abs(hard - 2000 * (1 - TABLES - EASY)) < 80
    assert {asked.left < asked.right for asked in drawn if asked.sign == "+"} == {True, False}


def test_a_question_holds_the_numbers_in_order():
    for index in range(50):
        asked = Sum(47, "-", 8)
        numbers = re.findall(r"\d+", question(Draw("train", index, 0.1), asked))
        assert numbers == ["47", "8"]
