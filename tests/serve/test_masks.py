"""What masks let a model write, whatever it would like to: random writers, held only by the mask."""

import itertools
import json
import re

import numpy as np
import pytest

from dsv4.data.tokenizer import plain_text, train_tokenizer
from dsv4.engine.text import Detokenizer
from dsv4.serve.masks import Grammars, OutputMask
from dsv4.text.message import Tool
from dsv4.text.tokens import DSML, EOS

TEXTS = [
    f'{{"name": "{word}", "sizes": [1, 2.5, null], "open": true}}\n\n</parameter> <invoke name="{word}">\n'
    for word in ("square", "circle", "weather", "city", "caf\u00e9", "\u4f60\u597d")
] * 3
VOCAB = 340
BLANKS = ("\u0120", "\u010a", "\u0109", "\u010d")  # as the vocabulary writes them
PADDED = 7  # ids that a model has beyond the tokenizer's

SHAPE = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["small", "large", 3]},
        "count": {"type": "integer", "minimum": -2, "maximum": 12},
        "notes": {"type": "array", "items": {"type": "string", "maxLength": 4}, "minItems": 1, "maxItems": 3},
        "inner": {"type": "object", "properties": {"deep": {"type": ["boolean", "null"]}}, "required": ["deep"],
                  "additionalProperties": False},
    },
    "required": ["kind", "count", "notes"],
    "additionalProperties": False,
}  # fmt: skip

FREE = Tool(function={"name": "look_up", "parameters": {"type": "object", "properties": {"key": {"type": "string"}}}})
STRICT = Tool(
    function={
        "name": "look",  # the beginning of the other's name
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {
                "unit": {"type": "string", "enum": ["cel sius", "k"]},
                "days": {"$ref": "#/$defs/days"},
                "place": {"anyOf": [{"type": "string", "minLength": 1, "maxLength": 3}, {"type": "null"}]},
                "day": {"type": "string", "format": "date"},
            },
            "required": ["unit", "days"],
            "additionalProperties": False,
            "$defs": {"days": {"type": "integer", "minimum": 1, "maximum": 14}},
        },
    }
)
TOOLS = (FREE, STRICT)

BLOCK = re.compile(
    rf"\n\n<{DSML}tool_calls>((?:\n<{DSML}invoke .*?\n</{DSML}invoke>)+)\n</{DSML}tool_calls>", re.DOTALL
)
CALL = re.compile(rf'\n<{DSML}invoke name="([^"]+)">\n(.*?)\n</{DSML}invoke>', re.DOTALL)
PARAMETER = re.compile(
    rf'<{DSML}parameter name="([^"]+)" string="(true|false)">(.*?)</{DSML}parameter>', re.DOTALL
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(iter(TEXTS), VOCAB)


@pytest.fixture(scope="module")
def grammars(tokenizer):
    return Grammars(tokenizer, VOCAB + PADDED, tokenizer.token_to_id(EOS))


class Writer:
    """Writes what the mask allows and chance likes, with a taste for what ends things."""

    def __init__(self, tokenizer, seed):
        self.tokenizer, self.chance = tokenizer, np.random.default_rng(seed)
        self.eos, self.dsml = tokenizer.token_to_id(EOS), tokenizer.token_to_id(DSML)
        self.special = {*tokenizer.get_added_tokens_decoder(), *range(VOCAB, VOCAB + PADDED)}
        self.taste = np.zeros(VOCAB + PADDED)
        for token, index in tokenizer.get_vocab().items():
            closes, opens = token.startswith(('"', "}", "]", "<", ",")), token.startswith(("{", "[", *BLANKS))
            self.taste[index] = 3.0 * closes - 3.0 * opens + token.startswith("</")
        self.taste[[self.eos, self.dsml]] = 3.0, 6.0

    def write(self, mask, named, limit=1500):
        """Return the output, its end included; no special token but ``named`` is ever allowed."""
        output = []
        while len(output) < limit:
            allowed = mask(output)
            assert allowed.shape == (VOCAB + PADDED,)
            assert not (self.special - set(named)) & set(np.flatnonzero(allowed).tolist())
            likes = self.taste * min(1 + len(output) / 100, 1.5) + 2 * self.chance.gumbel(size=len(allowed))
            output.append(int(np.where(allowed, likes, -np.inf).argmax()))
            if output[-1] == self.eos:
                assert mask(output) is None
                return output
        pytest.fail(f"no end after {limit} tokens: {self.text(output)[-300:]!r}")

    def text(self, output):
        return Detokenizer(self.tokenizer, skip_special_tokens=False).push(output).removesuffix(EOS)

    def ids(self, text):
        """The tokens of a text in which marks are tokens."""
        plain, found = plain_text(self.tokenizer), []
        for piece in re.split(f"({DSML})", text):
            found += [self.dsml] if piece == DSML else plain.encode(piece).ids
        return found

    def fits(self, grammar, text):
        """Whether a mask allows a whole text, token by token, and then its end."""
        mask, output = OutputMask(grammar, after=None), []
        for token in [*self.ids(text), self.eos]:
            if not mask(output)[token]:
                return False
            output.append(token)
        return True


@pytest.fixture
def writer(tokenizer, request):
    return Writer(tokenizer, sum(request.node.name.encode()))


def written(key, flag, value):
    return f'<{DSML}parameter name="{key}" string="{flag}">{value}</{DSML}parameter>'


def calls(text):
    """The calls of a block that is as it should be to the last character: (name, {key: (is_string, value)})."""
    block = BLOCK.fullmatch(text)
    assert block, text
    found = []
    for name, inner in CALL.findall(block[1]):
        parameters = PARAMETER.findall(inner)
        written = "\n".join(
            f'<{DSML}parameter name="{key}" string="{flag}">{value}</{DSML}parameter>'
            for key, flag, value in parameters
        )
        assert written == inner
        found.append((name, {key: (flag == "true", value) for key, flag, value in parameters}))
    assert "".join(f'\n<{DSML}invoke name="{name}">' for name, _ in found) == "".join(
        re.findall(rf'\n<{DSML}invoke name="[^"]+">', text)
    )
    return found


def check_call(name, given):
    if name == FREE.function["name"]:
        for is_string, value in given.values():
            assert is_string or json.loads(value) is not ...
        return
    assert name == "look"
    assert list(given) == [key for key in STRICT.properties if key in given]  # in the schema's order
    assert given["unit"] in [(True, "cel sius"), (True, "k")]
    assert not given["days"][0]
    assert 1 <= json.loads(given["days"][1]) <= 14
    if "place" in given:
        is_string, value = given["place"]
        assert 1 <= len(value) <= 3 if is_string else value == "null"
    if "day" in given:
        assert not given["day"][0]
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", json.loads(given["day"][1]))


def check_shape(value):
    assert list(value) in (["kind", "count", "notes"], ["kind", "count", "notes", "inner"])
    assert value["kind"] in ("small", "large", 3)
    assert type(value["count"]) is int
    assert -2 <= value["count"] <= 12
    assert 1 <= len(value["notes"]) <= 3
    assert all(isinstance(note, str) and len(note) <= 4 for note in value["notes"])
    assert value.get("inner", {"deep": None}) in ({"deep": True}, {"deep": False}, {"deep": None})


# JSON


def test_any_object_is_json(grammars, writer):
    grammar = grammars.json_schema({"type": "object"})
    found = [json.loads(writer.text(writer.write(OutputMask(grammar, after=None), [writer.eos]))) for _ in range(100)]
    assert all(isinstance(value, dict) for value in found)
    assert max(map(len, found)) > 1


def test_json_of_a_schema_fits_it(grammars, writer):
    grammar = grammars.json_schema(SHAPE)
    for _ in range(100):
        check_shape(json.loads(writer.text(writer.write(OutputMask(grammar, after=None), [writer.eos]))))


def test_the_only_answer_is_forced(grammars, writer):
    grammar = grammars.json_schema({"const": "a <think> b"})  # spelled, for the token is none of a text
    output = writer.write(OutputMask(grammar, after=None), [writer.eos])
    assert writer.text(output) == '"a <think> b"'
    assert not writer.special & set(output[:-1])


@pytest.mark.parametrize("text", ['{"a": 1}', '{\n  "a": [\n    1\n  ]\n}', '{"a":' + " " * 64 + "1}"])
def test_json_with_the_usual_blanks_fits(grammars, writer, text):
    assert writer.fits(grammars.json_schema({"type": "object"}), text)


@pytest.mark.parametrize(
    "text", ['{"a": 1', "[1]", '{"a": 1} ', ' {"a": 1}', '{"a":' + " " * 65 + "1}", "", "{'a': 1}"]
)
def test_what_is_no_object_does_not_fit(grammars, writer, text):
    assert not writer.fits(grammars.json_schema({"type": "object"}), text)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"not": {"type": "string"}}, r'^schema cannot be enforced: Unimplemented keys: \["not"\]$'),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "string", "format": "colour"}, "Unknown format: colour"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-ahead"),
        ({"$ref": "https://somewhere/else"}, "somewhere"),
        ({"$ref": "#/nowhere"}, "nowhere"),
        ({"properties": {"a": {"$ref": "#/properties/a"}}}, "leads to itself"),
        ({"anyOf": [{"$ref": "#"}]}, "schema cannot be enforced: nothing fits it"),
        ({"type": "integer", "minimum": 5, "maximum": 1}, "Unsatisfiable"),
        ({"type": "string", "x-guidance": {"lenient": True}, "contains": {}}, "contains"),
        ({"enum": ["a", f"<{DSML}tool_calls>"]}, "which is a mark"),
        ({"properties": {DSML: {}}}, "which is a mark"),
        ({"maximum": float("nan")}, "schema is no JSON"),
        ([], "expected an object"),
    ],
)
def test_a_schema_that_cannot_be_enforced_is_an_error(grammars, schema, message):
    with pytest.raises(ValueError, match=message):
        grammars.json_schema(schema)
    with pytest.raises(ValueError, match=message):
        grammars.tool_calls(TOOLS, choice="auto", answer=schema)


def test_a_schema_too_deep_is_an_error(grammars):
    for depth in (200, 5000):
        schema = {}
        for _ in range(depth):
            schema = {"items": schema}
        with pytest.raises(ValueError, match="recursion"):
            grammars.json_schema(schema)


# Tools


def test_with_tools_at_hand_a_text_may_go_on_to_calls(grammars, writer):
    grammar, num_texts, names = grammars.tool_calls(TOOLS, choice="auto"), 0, set()
    for _ in range(150):
        text = writer.text(writer.write(OutputMask(grammar, after=None), [writer.eos, writer.dsml]))
        if DSML not in text:
            num_texts += 1
            continue
        before, mark, block = text.partition(f"<{DSML}")
        for name, given in calls("\n\n" + mark + block):
            names.add(name)
            check_call(name, given)
        assert DSML not in before
    assert num_texts > 5
    assert names == {"look", "look_up"}


def test_a_call_can_be_demanded(grammars, writer):
    grammar, names = grammars.tool_calls(TOOLS, choice="required"), []
    for _ in range(100):
        found = calls(writer.text(writer.write(OutputMask(grammar, after=None), [writer.eos, writer.dsml])))
        names += [name for name, _ in found]
        for name, given in found:
            check_call(name, given)
    assert len(names) > 100
    assert set(names) == {"look", "look_up"}


@pytest.mark.parametrize("name", ["look", "look_up"])
def test_a_named_tool_is_called_once(grammars, writer, name):
    grammar = grammars.tool_calls(TOOLS, choice=name)
    for _ in range(40):
        [(called, given)] = calls(writer.text(writer.write(OutputMask(grammar, after=None), [writer.eos, writer.dsml])))
        assert called == name
        check_call(called, given)


def test_with_tools_at_hand_an_answer_can_have_to_be_json(grammars, writer):
    grammar, seen = grammars.tool_calls(TOOLS, choice="auto", answer=SHAPE), set()
    for _ in range(60):
        text = writer.text(writer.write(OutputMask(grammar, after=None), [writer.eos, writer.dsml]))
        seen.add(text[0])
        if text[0] == "{":
            check_shape(json.loads(text))
        else:
            assert calls(text)
    assert seen == {"{", "\n"}


def test_without_tools_only_the_answer_is_limited(grammars, writer):
    assert grammars.tool_calls((), choice="auto") is None
    grammar = grammars.tool_calls((), choice="auto", answer={"type": "integer"})
    assert writer.fits(grammar, "12")
    assert not writer.fits(grammar, "x")


def block(*parameters, name="look"):
    inner = "\n".join(itertools.starmap(written, parameters))
    return f'\n\n<{DSML}tool_calls>\n<{DSML}invoke name="{name}">\n{inner}\n</{DSML}invoke>\n</{DSML}tool_calls>'


UNIT, DAYS = ("unit", "true", "k"), ("days", "false", "3")


@pytest.mark.parametrize(
    "parameters",
    [
        [UNIT, DAYS],
        [UNIT, DAYS, ("place", "true", "</ ")],
        [UNIT, DAYS, ("place", "true", "\u4f60\u597d\u00e9")],  # characters, not bytes
        [UNIT, DAYS, ("place", "false", "null"), ("day", "false", '"2026-01-31"')],
        [UNIT, DAYS, ("day", "false", '"2026-01-31"')],
    ],
)
def test_arguments_of_a_strict_tool_that_fit(grammars, writer, parameters):
    assert writer.fits(grammars.tool_calls(TOOLS, choice="required"), block(*parameters))
    assert writer.fits(grammars.tool_calls(TOOLS, choice="auto"), "So:" + block(*parameters))


@pytest.mark.parametrize(
    "parameters",
    [
        [],
        [UNIT],
        [DAYS],
        [DAYS, UNIT],
        [UNIT, UNIT, DAYS],
        [("unit", "true", "kel"), DAYS],
        [("unit", "false", '"k"'), DAYS],
        [UNIT, ("days", "true", "3")],
        [UNIT, ("days", "false", "3.5")],
        [UNIT, ("days", "false", "15")],
        [UNIT, DAYS, ("place", "true", "")],
        [UNIT, DAYS, ("place", "true", "abcd")],
        [UNIT, DAYS, ("place", "false", '"abc"')],
        [UNIT, DAYS, ("day", "false", '"2026-13-31"')],
        [UNIT, DAYS, ("other", "true", "x")],
    ],
)
def test_arguments_of_a_strict_tool_that_do_not_fit(grammars, writer, parameters):
    assert not writer.fits(grammars.tool_calls(TOOLS, choice="required"), block(*parameters))
    assert not writer.fits(grammars.tool_calls(TOOLS, choice="auto"), block(*parameters))
    if parameters:
        assert writer.fits(grammars.tool_calls(TOOLS, choice="auto"), block(*parameters, name="look_up"))


@pytest.mark.parametrize("text", ["So:", "", "a < b </", "a\nb\n\n<"])
def test_a_text_that_calls_nothing_fits_where_no_call_is_demanded(grammars, writer, text):
    assert writer.fits(grammars.tool_calls(TOOLS, choice="auto"), text)
    assert not writer.fits(grammars.tool_calls(TOOLS, choice="required"), text)
    assert not writer.fits(grammars.tool_calls(TOOLS, choice="auto", answer=SHAPE), text)


@pytest.mark.parametrize(
    "text",
    [
        block(("a", "true", ""), ("b", "false", "[1]"), ("c d", "true", "\n</x>")),
        block(name="look_up"),
        block(name="look_up").replace(f"\n</{DSML}tool_calls>", block(name="look_up").partition("tool_calls>")[2]),
    ],
)
def test_calls_of_a_free_tool_that_fit(grammars, writer, text):
    text = text.replace('name="look"', 'name="look_up"')
    assert calls(text)
    assert writer.fits(grammars.tool_calls(TOOLS, choice="required"), text)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("look_up", "look_down"),
        ("look_up", "look_u"),
        ("tool_calls", "toolcalls"),
        ("\n\n<", "\n<"),
        ("parameter name", "argument name"),
        ('string="false"', "string=false"),
        ("[1]", "[1"),
        ("[1]", "one"),
        (f"</{DSML}invoke>\n", ""),
        (f"</{DSML}tool_calls>", f"</{DSML}tool_calls> so"),
    ],
)
def test_calls_of_a_free_tool_that_do_not_fit(grammars, writer, old, new):
    text = block(("a", "true", "x"), ("b", "false", "[1]"), name="look_up")
    assert old in text
    assert not writer.fits(grammars.tool_calls(TOOLS, choice="required"), text.replace(old, new))
