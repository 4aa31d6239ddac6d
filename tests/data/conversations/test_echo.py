"""What is said again is in the question, in its order, and held out."""

import pytest

from dsv4.data.conversations.draw import Draw
from dsv4.data.conversations.echo import draw_echo

SIDES = ("train", "validation")


@pytest.mark.parametrize("side", SIDES)
def test_the_answer_is_in_the_question(side):
    counts = set()
    for index in range(300):
        echo = draw_echo(Draw(side, index, 0.2), 5)
        assert echo.question.endswith(f" {echo.answer}")
        counts.add(len(echo.answer.split()))
    assert counts == {1, 2, 3, 4, 5}


def test_words_are_held_out():
    said = {
        side: {word for index in range(300) for word in draw_echo(Draw(side, index, 0.2), 5).answer.split()}
        for side in SIDES
    }
    # A capital letter makes a made-up name another word, which is not told apart here.
    assert not {word.lower() for word in said["train"]} & {word.lower() for word in said["validation"]}
