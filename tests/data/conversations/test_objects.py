"""Facts and the object that states them."""

import json

import pytest

from dsv4.data.conversations.draw import Draw, side_of
from dsv4.data.conversations.objects import draw_object
from dsv4.data.conversations.words import CITIES, COLOURS, DRINKS, PEOPLE, THINGS
from dsv4.eval.chat import fits

HELD_OUT = 0.2


def drawn(side, count=400):
    return [draw_object(Draw(side, index, HELD_OUT)) for index in range(count)]


def test_the_answer_fits_its_schema_in_the_schemas_order():
    bare = 0
    for asked in drawn("train"):
        answer = json.loads(asked.answer)
        if asked.schema is None:
            bare += 1
            assert all(name in asked.question.partition(":")[0] for name in answer)
            continue
        assert fits(answer, asked.schema)
        assert list(answer) == list(asked.schema["properties"])
        assert asked.schema.get("required", list(answer)) == list(answer)
    assert 60 < bare < 120


def test_the_facts_are_in_the_question():
    for asked in drawn("train"):
        answer = json.loads(asked.answer)
        for name, value in answer.items():
            if isinstance(value, bool):
                assert "member" in asked.question
                assert ("is not a member" in asked.question or f"{name}: no" in asked.question) == (not value)
            elif "What is" in asked.question:
                assert eval(asked.question.removeprefix("What is ").removesuffix("?")) == value
            else:
                assert str(value) in asked.question


@pytest.mark.parametrize("side", ["train", "validation"])
def test_names_are_of_their_side(side):
    known = {*PEOPLE, *THINGS, *CITIES} - {*COLOURS, *DRINKS}  # of those a value may be, and none is held out
    values = {value for asked in drawn(side) for value in json.loads(asked.answer).values() if isinstance(value, str)}
    found = values & known
    assert len(found) > 10
    assert {side_of(name, HELD_OUT) for name in found} == {side}
