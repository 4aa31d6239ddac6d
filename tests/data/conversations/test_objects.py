"""Facts and the object that states them."""

import json

from dsv4.data.conversations.draw import Draw
from dsv4.data.conversations.objects import draw_object
from dsv4.data.conversations.words import CITIES, COLOURS, COMMON, DRINKS, PEOPLE, THINGS
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
            else:
                assert str(value) in asked.question


def test_names_and_cities_of_validation_are_made_up_and_in_no_training():
    def names(side):
        values = (value for asked in drawn(side) for value in json.loads(asked.answer).values())
        return {value for value in values if isinstance(value, str)} - {*COLOURS, *DRINKS}

    train, validation = names("train"), names("validation")
    assert all(train & {*known} for known in (PEOPLE, CITIES, (*THINGS, *COMMON)))
    assert not validation & {*train, *PEOPLE, *CITIES, *THINGS, *COMMON}
    assert len(validation) > 300


def test_facts_are_told_in_the_order_of_the_object_but_for_some():
    """So that a model may rely on it often, and not always."""
    same = total = 0
    for asked in drawn("train"):
        numbers = [str(value) for value in json.loads(asked.answer).values() if isinstance(value, int) and value > 1]
        if len(numbers) > 1:
            places = [asked.question.index(f" {number}") for number in numbers]
            total += 1
            same += places == sorted(places)
    assert 0.75 * total < same < total
