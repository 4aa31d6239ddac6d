"""A draw is a function of side and index, and its facts lie on its side."""

import re
from collections import Counter

import pytest

from dsv4.data.conversations.draw import Draw, side_of
from dsv4.data.conversations.words import REAL

WORDS = tuple(f"word{i}" for i in range(2000))


def test_the_same_place_draws_the_same_and_others_do_not():
    def drawn(side, index):
        draw = Draw(side, index, 0.3)
        return [draw.below(1000) for _ in range(5)]

    assert drawn("train", 3) == drawn("train", 3)
    assert len({tuple(drawn(side, index)) for side in ("train", "validation") for index in range(5)}) == 10


def test_the_choices_are_those_of_every_machine():
    draw = Draw("train", 0, 0.1)
    assert [draw.below(100) for _ in range(4)] == [31, 94, 4, 52]


def test_ranges():
    draw = Draw("train", 1, 0.1)
    assert {draw.below(3) for _ in range(100)} == {0, 1, 2}
    assert {draw.between(4, 6) for _ in range(100)} == {4, 5, 6}
    counts = Counter(draw.chance(0.25) for _ in range(2000))
    assert 400 < counts[True] < 600
    assert sorted(draw.some("abcde", 5)) == list("abcde")
    assert all(len(set(draw.some("abcde", 3))) == 3 for _ in range(20))
    assert len({tuple(draw.some("abc", 3)) for _ in range(100)}) == 6  # every order


def test_facts_lie_on_one_side_and_the_share_is_kept():
    held_out = {word for word in WORDS if side_of(word, 0.1) == "validation"}
    assert 150 < len(held_out) < 250
    assert held_out < {word for word in WORDS if side_of(word, 0.2) == "validation"}
    for side, others in (("train", held_out), ("validation", set(WORDS) - held_out)):
        draw = Draw(side, 0, 0.1)
        assert not others & {draw.fact(lambda draw=draw: draw.choice(WORDS), str) for _ in range(300)}


def test_made_up_names_are_words_of_their_side():
    names = {side: {Draw(side, index, 0.2).name() for index in range(300)} for side in ("train", "validation")}
    assert not names["train"] & names["validation"]
    assert all(name.isalpha() and name.islower() for name in names["train"])
    assert len(names["train"]) > 290
    assert not REAL & {Draw("train", index, 0.2).name() for index in range(5000)}


def test_real_words_are_for_training():
    called = {
        side: [Draw(side, index, 0.2).called(("tea", "milk"), 0.5) for index in range(300)]
        for side in ("train", "validation")
    }
    assert 100 < sum(word in ("tea", "milk") for word in called["train"]) < 200
    assert not {*called["validation"]} & {"tea", "milk", *called["train"]}


def test_numbers_of_one_to_three_digits_and_forms():
    numbers = {Draw("train", index, 0.1).number() for index in range(500)}
    assert {len(number) for number in numbers} >= {1, 2, 3, 5}
    assert any(number.endswith(":45") for number in numbers)
    assert all(re.fullmatch(r"[0-9:.]+", number) for number in numbers)


def test_a_side_without_facts_is_refused():
    with pytest.raises(ValueError, match=r"share of held-out facts is 0\.0; expected one that leaves facts like 'b'"):
        Draw("validation", 0, 0.0).fact(lambda: "b", str)
