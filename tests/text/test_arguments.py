import json

import pytest

from dsv4.text.arguments import Arguments
from dsv4.text.message import Tool

TOOL = Tool(
    function={
        "name": "f",
        "parameters": {"properties": {"a": {"type": "string"}, "b": {"type": "integer"}}, "required": ["a"]},
    }
)


def write(*parameters, tool=TOOL, instead=""):
    """The arguments' text for (key, is_string, value), each value letter by letter, and the number of notes."""
    pieces, notes = [], []
    arguments = Arguments(tool, pieces.append, notes.append)
    for key, is_string, value in parameters:
        arguments.begin(key, is_string)
        for letter in value:
            arguments.write(letter)
        arguments.end()
    is_used = arguments.close(instead)
    json.loads("".join(pieces))
    return "".join(pieces), len(notes), is_used


def test_texts_and_values():
    text, num_notes, _ = write(("a", True, 'x "\\\n\u6c34'), ("b", False, "[1,  {}]"), ("c", False, " 1e999 "))
    assert text == '{"a": "x \\"\\\\\\n\u6c34", "b": [1,  {}], "c":  1e999 }'
    assert num_notes == 0
    assert write() == ("{}", 0, True)
    assert write(("", True, "")) == ('{"": ""}', 0, True)


def test_texts_are_written_as_they_come():
    pieces = []
    arguments = Arguments(None, pieces.append, pieces.append)
    arguments.begin("a", True)
    arguments.write("x")
    assert "".join(pieces) == '{"a": "x'
    arguments.end()
    arguments.begin("b", False)
    arguments.write("1")
    assert "".join(pieces) == '{"a": "x", "b": '
    arguments.end()
    assert "".join(pieces) == '{"a": "x", "b": 1'


@pytest.mark.parametrize("value", ["[1, oops", "", "NaN", "Bern", "-Infinity", "[" * 9999, "9" * 9999])
def test_what_is_no_json_is_a_string(value):
    text, num_notes, _ = write(("b", False, value))
    assert json.loads(text) == {"b": value}
    assert num_notes == 1


@pytest.mark.parametrize(("value", "expected"), [("True", True), (" False ", False), ("None", None)])
def test_words_of_python(value, expected):
    text, num_notes, _ = write(("b", False, value))
    assert (json.loads(text), num_notes) == ({"b": expected}, 1)


def test_the_first_of_two_counts():
    assert write(("a", True, "x"), ("a", True, "y"), ("b", False, "1")) == ('{"a": "x", "b": 1}', 1, True)


def test_a_parameter_that_does_not_say_what_it_is():
    assert write(("a", None, "1")) == ('{"a": "1"}', 1, True)
    assert write(("b", None, "1")) == ('{"b": 1}', 1, True)
    assert write(("b", None, "x")) == ('{"b": "x"}', 1, True)
    assert write(("a", None, "1"), tool=None) == ('{"a": 1}', 1, True)


@pytest.mark.parametrize("key", ["arguments", "input", "parameters"])
@pytest.mark.parametrize("is_string", [True, False])
def test_arguments_wrapped_once_more(key, is_string):
    assert write((key, is_string, ' {"a": "x"}\n')) == ('{"a": "x"}', 1, True)
    as_it_is = json.dumps({key: '{"a": "x"}' if is_string else {"a": "x"}})
    assert write((key, is_string, '{"a": "x"}'), tool=None) == (as_it_is, 0, True)
    # It is not certain that the wrapper is meant to go.
    own = Tool(function={"name": "f", "parameters": {"properties": {key: {}, "a": {}}}})
    assert write((key, is_string, '{"a": "x"}'), tool=own) == (as_it_is, 0, True)
    assert json.loads(write((key, is_string, '{"c": 1}'))[0]).keys() == {key}
    assert json.loads(write((key, is_string, "[1]"))[0]).keys() == {key}
    assert json.loads(write((key, is_string, '{"a": "x"}'), ("b", False, "1"))[0]).keys() == {key, "b"}
    assert json.loads(write(("b", False, "1"), (key, is_string, '{"a": "x"}'))[0]).keys() == {key, "b"}


def test_json_in_place_of_parameters():
    assert write(instead='\n{"a":  "x"}') == ('{"a":  "x"}', 1, True)
    assert write(instead='{"input": {"a": "x"}}') == ('{"a": "x"}', 1, True)
    assert write(instead='{"input": {"c": "x"}}') == ('{"input": {"c": "x"}}', 1, True)
    assert write(instead="[1]") == ("{}", 0, False)
    assert write(("b", False, "1"), instead='{"a": "x"}') == ('{"b": 1}', 0, False)
    assert write(("input", False, '{"a": "x"}'), instead="{}") == ('{"a": "x"}', 1, False)


def test_whole_arguments_have_all_that_is_required():
    for tool, parameters, expected in (
        (TOOL, ["a"], True),
        (TOOL, ["b"], False),
        (None, ["a"], False),
        (Tool(function={"name": "f"}), [], True),
        (Tool(function={"name": "f", "parameters": {"required": "all"}}), ["a"], False),
    ):
        arguments = Arguments(tool, lambda _: None, lambda _: None)
        for key in parameters:
            arguments.begin(key, True)
            arguments.end()
        assert arguments.is_whole() is expected
