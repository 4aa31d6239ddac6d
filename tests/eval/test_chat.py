"""How answers are marked: the right one is right, and what is a little wrong is wrong."""

from dataclasses import dataclass, replace

import pytest

from dsv4.eval.chat import Mark, Score, fits, mark, questions, scores
from dsv4.text.message import Message, Tool, ToolCall
from dsv4.text.passages import OWN

RIGHT, WRONG, NOT_VALID = (
    Mark(is_valid=True, is_right=True),
    Mark(is_valid=True, is_right=False),
    Mark(is_valid=False, is_right=False),
)
SCHEMA = {
    "type": "object",
    "properties": {"age": {"type": "integer"}, "member": {"type": "boolean"}},
    "required": ["age"],
    "additionalProperties": False,
}
TOOL = Tool(function={"name": "get_price", "parameters": {"type": "object"}})


@dataclass(frozen=True)
class Made:
    messages: tuple
    values: tuple
    kind: str = "some"
    thinking: bool = False
    effort: str = "high"


def user(text):
    return Message(role="user", content=text)


def said(text="", *calls, reasoning=None):
    made = tuple(ToolCall(name=name, arguments=arguments) for name, arguments in calls)
    return Message(role="assistant", content=text, tool_calls=made, reasoning=reasoning)


SUM = Made((user("1 + 11"), said("12")), ("12",))
OBJECT = Made(
    (Message(role="system", response_format=SCHEMA), user("3, a member"), said('{"age": 3, "member": true}')), ("",)
)
LOOKUP = Made(
    (
        Message(role="system", tools=(TOOL,)),
        user("price of tea"),
        said("", ("get_price", '{"of": "tea"}')),
        Message(role="tool", content="4 euros"),
        said("It is 4 euros."),
        user("hello"),
        said("Hello!"),
    ),
    ("", "4 euros", "Hello!"),
)


def marked(made, answer, which=0):
    return mark(questions([made])[which], answer)


def test_every_message_of_the_assistant_is_a_question_with_what_was_said_before():
    asked = questions([SUM, LOOKUP, OBJECT])
    assert [one.part for one in asked] == ["answer", "call", "answer", "no call", "object"]
    assert [len(one.before) for one in asked] == [1, 2, 4, 6, 2]
    assert [one.wanted for one in asked[1:4]] == [LOOKUP.messages[i] for i in (2, 4, 6)]
    assert asked[1].tools == (TOOL,)
    assert asked[0].tools == ()
    assert asked[4].schema == SCHEMA
    assert asked[0].schema is None


@pytest.mark.parametrize("thinking", [True, False])
def test_a_prompt_ends_where_the_answer_begins(thinking):
    prompt = questions([replace(SUM, thinking=thinking)])[0].prompt(OWN)
    assert prompt.text.endswith("1 + 11<\uff5cAssistant\uff5c>" + ("<think>" if thinking else "</think>"))
    assert questions([replace(SUM, thinking=True, effort="max")])[0].prompt(OWN).text != prompt.text


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        (said("12"), RIGHT),
        (said("It is 12.", reasoning="1 + 1"), RIGHT),
        (said("112"), WRONG),
        (said("12a"), WRONG),
        (said("", reasoning="12"), NOT_VALID),  # thought, not said
        (said("12", ("get_price", "{}")), NOT_VALID),
    ],
)
def test_an_answer_holds_the_value_as_a_word(answer, wanted):
    assert marked(SUM, answer) == wanted


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        (said("", ("get_price", '{"of":"tea"}')), RIGHT),
        (said("", ("get_prise", '{"of": "tea"}')), WRONG),
        (said("", ("get_price", '{"of": "teas"}')), WRONG),
        (said("", ("get_price", '{"off": "tea"}')), WRONG),
        (said("", ("get_price", '{"of": "tea"')), WRONG),
        (said("", *[("get_price", '{"of": "tea"}')] * 2), NOT_VALID),
        (said("4 euros"), NOT_VALID),
    ],
)
def test_a_call_is_compared_as_values(answer, wanted):
    assert marked(LOOKUP, answer) == wanted


def test_after_a_result_and_in_small_talk_a_call_is_wrong():
    call = said("It is 4 euros. Hello!", ("get_price", '{"of": "tea"}'))
    for which, right in ((1, "So it is 4 euros."), (2, "Hello!")):
        assert marked(LOOKUP, call, which) == NOT_VALID
        assert marked(LOOKUP, said(right), which) == RIGHT


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('{"member": true, "age": 3}', RIGHT),
        ('{"age": 3}', WRONG),
        ('{"age": 3, "member": false}', WRONG),
        ('{"age": true, "member": true}', NOT_VALID),
        ('{"age": 3.5, "member": true}', NOT_VALID),
        ('{"age": 3, "member": 1}', NOT_VALID),
        ('{"member": true}', NOT_VALID),
        ('{"age": 3, "member": true, "name": "Ada"}', NOT_VALID),
        ('{"age": 3, "member": true', NOT_VALID),
        ("[3]", NOT_VALID),
        ("three", NOT_VALID),
    ],
)
def test_an_object_fits_its_schema_and_says_the_same(text, wanted):
    assert marked(OBJECT, said(text)) == wanted


def test_without_a_schema_any_object_is_valid():
    free = replace(OBJECT, messages=OBJECT.messages[1:])
    assert marked(free, said('{"x": 1}')) == WRONG
    assert marked(free, said("[1]")) == NOT_VALID
    assert marked(free, said('{"age": 3, "member": 1}')) == WRONG  # 1 is not true
    assert marked(free, said(OBJECT.messages[-1].text)) == RIGHT


def test_fits_inside_of_objects():
    outer = {"type": "object", "properties": {"of": SCHEMA}}
    assert fits({"of": {"age": 1}}, outer)
    assert not fits({"of": {"age": "1"}}, outer)
    assert not fits("x", outer)
    assert fits({"anything": None}, {})
    assert fits(2, {"type": "number"})
    assert not fits(True, {"type": "number"})


def test_scores_add_up_by_sort():
    asked = questions([SUM, replace(SUM, thinking=True), SUM, OBJECT])
    marks = [RIGHT, WRONG, NOT_VALID, RIGHT]
    assert scores(zip(asked, marks, strict=True)) == {
        ("some", "answer", False): Score(count=2, valid=1, right=1),
        ("some", "answer", True): Score(count=1, valid=1, right=0),
        ("some", "object", False): Score(count=1, valid=1, right=1),
    }
