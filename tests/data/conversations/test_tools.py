"""Tools and questions for them: what a question asks for is in it, and its answer is in the result."""

import json

import pytest

from dsv4.data.conversations.draw import Draw
from dsv4.data.conversations.tools import CALCULATOR, CLOCK, LOOKUP, MOST_TOOLS, NOUNS, draw_toolbox, draw_use

HELD_OUT = 0.2
SIDES = ("train", "validation")


def drawn(side, count=400):
    """Uses, each with the tools that were offered."""
    for index in range(count):
        draw = Draw(side, index, HELD_OUT)
        tools = draw_toolbox(draw)
        yield tools, draw_use(draw, tools)


def test_a_toolbox_has_one_to_three_tools_of_one_sort():
    sizes = set()
    for tools, _ in drawn("train"):
        names = {tool.name for tool in tools}
        assert len(names) == len(tools)
        sizes.add(len(names))
        assert names <= {LOOKUP, CALCULATOR, CLOCK} or names <= {f"get_{noun}" for noun in NOUNS}
    assert sizes == set(range(1, MOST_TOOLS + 1))


@pytest.mark.parametrize("side", SIDES)
def test_a_use_fits_one_of_the_tools(side):
    used = set()
    for tools, use in drawn(side):
        (tool,) = (tool for tool in tools if tool.name == use.tool)
        assert list(use.arguments) == tool.parameters["required"] == list(tool.properties)
        assert json.loads(use.arguments_text) == use.arguments
        used.add(use.tool)
    assert used >= {LOOKUP, CALCULATOR, CLOCK}


@pytest.mark.parametrize("side", SIDES)
def test_arguments_are_in_the_question_and_the_value_in_result_and_answer(side):
    missing = 0
    for _, use in drawn(side):
        assert all(value.casefold() in use.question.casefold() for value in use.arguments.values()), use
        assert use.value in use.answer
        missing += use.result == "not found"
        assert use.value in use.result or use.value == f"found nothing for {use.arguments[next(iter(use.arguments))]}"
    assert 5 < missing < 80


def test_a_calculation_is_right():
    results = [use for _, use in drawn("train", 800) if use.tool == CALCULATOR]
    assert len(results) > 50
    for use in results:
        assert eval(use.arguments["expression"]) == int(use.value)


def test_made_up_keys_are_held_out():
    keys = {side: {key for _, use in drawn(side) for key in use.arguments.values()} for side in SIDES}
    shared = keys["train"] & keys["validation"]
    assert not shared, shared
