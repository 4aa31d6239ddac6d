"""How the schema of a strict tool becomes parameters: what is text, what is JSON, and what cannot be either."""

import json

import numpy as np
import pytest

from dsv4.data.tokenizer import train_tokenizer
from dsv4.serve.grammar_schema import check_schema, parameters
from dsv4.serve.masks import Grammars, OutputMask
from dsv4.text.message import Tool
from dsv4.text.tokens import DSML, EOS

ANY = {"type": ["array", "boolean", "integer", "null", "number", "object"]}  # but a string
UNIT, TREE = {"$ref": "#/$defs/Unit"}, {"$ref": "#/$defs/Tree"}
DEFINITIONS = {"Unit": {"enum": ["c", "k"]}, "Also": UNIT, "Tree": {"anyOf": [TREE]}}


def tool(name="look", **schema):
    return Tool(function={"name": name, "strict": True, "parameters": {"type": "object", **schema}})


@pytest.fixture(scope="module")
def grammars():
    tokenizer = train_tokenizer(iter(["for word in words:\n    print(word)\n"] * 4), 282)
    return Grammars(tokenizer, 282, tokenizer.token_to_id(EOS))


@pytest.mark.parametrize(
    ("schema", "values", "lengths", "json_schema"),
    [
        ({"type": "string"}, (), ((0, None),), None),
        ({"type": "string", "description": "a text", "default": "x"}, (), ((0, None),), None),
        ({"type": "string", "minLength": 2, "maxLength": 7}, (), ((2, 7),), None),
        ({"type": "string", "enum": ["a", "b"]}, ("a", "b"), (), None),
        ({"type": "string", "enum": ["a", 1]}, ("a",), (), None),
        ({"const": "a"}, ("a",), (), None),
        ({"const": None}, (), (), {"enum": [None]}),
        ({"enum": ["a", 1, 2.5, None, True]}, ("a",), (), {"enum": [1, 2.5, None, True]}),
        ({"type": ["string", "integer"], "enum": ["a", 1, None, True, 2.5]}, ("a",), (), {"enum": [1]}),
        ({"type": "number", "enum": ["a", 1, 2.5]}, (), (), {"enum": [1, 2.5]}),
        ({"type": ["string", "null"]}, (), ((0, None),), {"type": ["null"]}),
        ({"anyOf": [{"enum": ["a"]}, {"type": "string", "minLength": 3}, {"type": "null"}, {"type": "integer"}]},
         ("a",), ((3, None),), {"anyOf": [{"type": "null"}, {"type": "integer"}]}),
        ({}, (), ((0, None),), ANY),
        (True, (), ((0, None),), ANY),
        ({"type": "integer", "minimum": 3}, (), (), {"type": "integer", "minimum": 3}),
        ({"type": "string", "format": "date"}, (), (), {"type": "string", "format": "date"}),
        ({"type": "string", "pattern": "^a$"}, (), (), {"type": "string", "pattern": "^a$"}),
        ({"$ref": "#/$defs/Also", "description": "a unit"}, ("c", "k"), (), None),
        ({"type": "array", "items": UNIT}, (), (), {"type": "array", "items": UNIT}),
    ],
)  # fmt: skip
def test_forms_of_a_parameter(schema, values, lengths, json_schema):
    [found] = parameters(tool(properties={"key": schema}, **{"$defs": DEFINITIONS}))
    assert (found.values, found.lengths) == (values, lengths)
    expected = None if json_schema is None else {**json_schema, "$defs": DEFINITIONS}
    assert json.dumps(found.schema) == json.dumps(expected)  # so that True is not 1


def test_parameters_come_in_order_and_those_without_a_value_never():
    properties = {"b": {"type": "string"}, "none": False, "round": TREE, "a": {"type": "null"}}
    found = parameters(tool(properties=properties, required=["a"], **{"$defs": DEFINITIONS}))
    assert [(one.name, one.is_required) for one in found] == [("b", False), ("a", True)]
    assert parameters(Tool(function={"name": "look", "strict": True})) == []


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"properties": {"a": {"not": {}}}}, r"^the schema of tool 'look' cannot be enforced: .*not"),
        ({"properties": ["a"]}, "properties must be an object"),
        ({"properties": {"a": {"type": "string", "minLength": 3, "maxLength": 2}}, "required": ["a"]}, "Unsatisfiable"),
        ({"patternProperties": {"^a": {}}}, "the parameters of tool 'look' have patternProperties, which cannot be"),
        ({"minProperties": 1, "anyOf": [{}]}, "have anyOf, minProperties, which cannot be enforced"),
        ({"type": "array"}, "have the type 'array'; expected object"),
        ({"type": ["object", "null"]}, "have the type .'object', 'null'.; expected object"),
        ({"required": ["a", "b"], "properties": {"b": {}}}, "require 'a'; expected names among their properties"),
        ({"properties": {"a": {"$ref": "#"}}}, "refer to '#'; expected #/.defs/NAME or #/definitions/NAME"),
        ({"properties": {"a": {}, "b": {"$ref": "#/properties/a"}}}, "refer to '#/properties/a'"),
        ({"properties": {"a": {"$ref": "#/$defs/a"}}, "$defs": {"a": {"$ref": "#/$defs/a"}}}, "leads to itself"),
        ({"properties": {"a": {"$ref": "#/$defs/b"}}, "$defs": {"a": {}}}, "does not exist"),
        ({"properties": {'a"b': {}}}, "a property of tool 'look' is 'a\"b'; expected characters other than quotes"),
        ({"properties": {"a\nb": {}}}, "line breaks"),
        ({"properties": {"a": {"enum": [f"x{DSML}"]}}}, "which is a mark"),
        ({"properties": {"a": {"minimum": float("inf")}}}, "is no JSON"),
    ],
)
def test_a_strict_tool_that_cannot_be_enforced_is_an_error(grammars, schema, message):
    with pytest.raises(ValueError, match=message):
        grammars.tool_calls([tool(**schema)], choice="auto")
    free = Tool(function={"name": "look", "parameters": schema})
    assert grammars.tool_calls([free], choice="auto") is not None


@pytest.mark.parametrize("keys", ["", "a", "b", "c", "ab", "ac", "bc", "abc", "ba", "ca", "aa"])
@pytest.mark.parametrize("required", ["", "a", "b", "c", "ac"])
def test_parameters_that_are_not_required_may_be_left_out(grammars, keys, required):
    """Of three, in their order; a call without any has an empty line in their place."""
    one = tool(properties={key: {"const": "x"} for key in "abc"}, required=list(required))
    mask = OutputMask(grammars.tool_calls([one], choice="look"), after=None)
    output, written, names, wanted = [], b"", grammars.json_schema({"type": "object"}).vocabulary, call_of(keys)
    while written != wanted:
        fits = [
            index for index in np.flatnonzero(mask(output)) if wanted[len(written) :].startswith(names.bytes[index])
        ]
        if not fits:
            break
        output.append(int(fits[0]))
        written += names.bytes[output[-1]]
    is_allowed = list(keys) == sorted(set(keys)) and set(required) <= set(keys)
    assert (written == wanted) == is_allowed


def call_of(keys):
    inner = "\n".join(f'<{DSML}parameter name="{key}" string="true">x</{DSML}parameter>' for key in keys)
    text = f'\n\n<{DSML}tool_calls>\n<{DSML}invoke name="look">\n{inner}\n</{DSML}invoke>\n</{DSML}tool_calls>'
    return text.encode()


@pytest.mark.parametrize(
    ("names", "choice", "message"),
    [
        (["a", "b"], "c", "the tool to call is 'c'; expected one of a, b"),
        (["a", "b", "a"], "auto", "tools has 2 of the name 'a'; expected each name once"),
        (['a"b'], "auto", "the name of a tool is 'a\"b'"),
        ([f"a{DSML}"], "required", "the name of a tool is"),
        ([], "required", "tools has none, and the tool to call is 'required'; expected tools"),
        ([], "a", "tools has none"),
    ],
)
def test_tools_that_cannot_be_called_are_an_error(grammars, names, choice, message):
    with pytest.raises(ValueError, match=message):
        grammars.tool_calls([Tool(function={"name": name}) for name in names], choice=choice)


def test_descriptions_may_speak_of_the_markup():
    check_schema({"description": f"not {DSML}", "properties": {"a": {"title": DSML}}}, "schema")
    with pytest.raises(ValueError, match="schema has the text"):
        check_schema({"properties": {"title": {"const": DSML}}}, "schema")
