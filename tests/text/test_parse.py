"""Completions that are as they should be, and every way to be malformed that is repaired or delivered as text."""

import pytest

from dsv4.text.events import CallArguments, CallBegin, CallEnd, Content, Note, Reasoning, message_of
from dsv4.text.message import Tool
from dsv4.text.parse import Parser, parse
from dsv4.text.tokens import DSML, END_THINK, EOS, THINK

SCHEMA = {"properties": {"a": {"type": "string"}, "b": {"type": "integer"}}, "required": ["a"]}
TOOLS = (Tool(function={"name": "f", "parameters": SCHEMA}), Tool(function={"name": "now"}))

OPEN, CLOSE = f"<{DSML}tool_calls>", f"</{DSML}tool_calls>"
F, END = f'<{DSML}invoke name="f">', f"</{DSML}invoke>"
A, B, DONE = (f'<{DSML}parameter name="a" string="true">', f'<{DSML}parameter name="b" string="false">',
              f"</{DSML}parameter>")  # fmt: skip
CALL = f"{F}\n{A}x{DONE}\n{END}"
BLOCK = f"{OPEN}\n{CALL}\n{CLOSE}"


def events_of(text, *, thinking=False, tools=TOOLS, cut=False):
    """Events of the text at once, which must be those of the text letter by letter."""
    parser = Parser(thinking=thinking, tools=tools)
    whole = joined([*parser.push(text), *parser.finish(cut=cut)])
    parser = Parser(thinking=thinking, tools=tools)
    single = [event for letter in text for event in parser.push(letter)]
    assert joined([*single, *parser.finish(cut=cut)]) == whole
    return whole


def joined(events):
    result = []
    for event in events:
        last = result[-1] if result else None
        if type(event) is type(last) and isinstance(event, Content | Reasoning):
            result[-1] = type(event)(last.text + event.text)
        elif isinstance(event, CallArguments) and isinstance(last, CallArguments) and event.index == last.index:
            result[-1] = CallArguments(event.index, last.text + event.text)
        else:
            result.append(event)
    return result


def read(text, **options):
    """(reasoning, content, [(name, arguments)], notes)"""
    events = events_of(text, **options)
    message = message_of(events)
    calls = [(call.name, call.arguments) for call in message.tool_calls]
    return message.reasoning, message.text, calls, [event.text for event in events if isinstance(event, Note)]


X = [("f", '{"a": "x"}')]


@pytest.mark.parametrize("end", ["", EOS])
def test_completions_as_they_should_be(end):
    assert read(f"T\n{END_THINK}A\n\n{BLOCK}{end}", thinking=True) == ("T\n", "A", X, [])
    assert read(f"{END_THINK}A{end}", thinking=True) == (None, "A", [], [])
    assert read(f"\n{END_THINK}\n\n\n{BLOCK}{end}", thinking=True) == ("\n", "\n", X, [])
    assert read(f"A{end}") == (None, "A", [], [])
    assert read(f" {end}") == (None, " ", [], [])
    assert read(end) == (None, "", [], [])
    two = f"{OPEN}\n{CALL}\n{F}\n{B}7{DONE}\n{A}\n\n{DONE}\n{END}\n{CLOSE}{end}"
    assert read(two) == (None, "", [*X, ("f", '{"b": 7, "a": "\\n\\n"}')], [])
    assert read(f'A\n\n{OPEN}\n<{DSML}invoke name="now">\n\n{END}\n{CLOSE}{end}') == (None, "A", [("now", "{}")], [])


def test_events_in_order():
    text = f"T{END_THINK}A\n\n{OPEN}\n{CALL}\n{F}\n{END}\n{CLOSE}"
    assert events_of(text, thinking=True) == [
        Reasoning("T"), Content("A"), CallBegin(0, "f"), CallArguments(0, '{"a": "x"}'), CallEnd(0), CallBegin(1, "f"),
        CallArguments(1, "{}"), CallEnd(1),
    ]  # fmt: skip
    assert parse(text, thinking=True) == message_of(events_of(text, thinking=True))


def test_events_come_as_soon_as_they_can():
    parser = Parser(thinking=True)
    for piece, expected in (
        ("T <", [Reasoning("T ")]),
        ("b>", [Reasoning("<b>")]),
        ("\n</think>A", [Reasoning("\n"), Content("A")]),
        ("b\n\n", [Content("b")]),
        ("\n", [Content("\n")]),
        (
            BLOCK[: -len(f"{DONE}\n{END}\n{CLOSE}")],
            [CallBegin(0, "f"), CallArguments(0, '{"a": "'), CallArguments(0, "x")],
        ),
        ("y\u6c34".encode()[:-1], [CallArguments(0, "y")]),
        ("\u6c34".encode()[-1:], [CallArguments(0, "\u6c34")]),
        (DONE, [CallArguments(0, '"')]),
        (END, [CallArguments(0, "}"), CallEnd(0)]),
    ):
        assert parser.push(piece) == expected
    assert parser.finish() == [Note("a tool block has no end")]
    with pytest.raises(ValueError, match="after finish"):
        parser.push("x")


@pytest.mark.parametrize("name", ["toolcalls", "function_calls", "tool_call", "ToolCalls"])
def test_other_names_of_a_block(name):
    for text in (BLOCK.replace("tool_calls", name), f"<{DSML}{name}>{CALL}{CLOSE}", f"{OPEN}{CALL}</{DSML}{name}>"):
        *result, notes = read(f"A\n\n{text}")
        assert result == [None, "A", X]
        assert notes
        assert all(name in note for note in notes)


@pytest.mark.parametrize(
    ("text", "note"),
    [
        (f"{OPEN}\n{F}\n{A}x\n{END}\n{CLOSE}", "no end before"),  # the end of a parameter
        (f"{OPEN}\n{F}\n{A}x\n{CLOSE}", "no end before"),  # and of the call
        (f"{OPEN}\n{F}\n{A}x{DONE}\n{CLOSE}", "f has no end before"),
        (f"{OPEN}\n{CALL}", "block has no end"),
        (f"{OPEN}\n{F}\n{A}x{DONE}\n", "f has no end"),  # it has all that f requires
        (f"{OPEN}\n{OPEN}\n{CALL}\n{CLOSE}\n{CLOSE}", "begins twice"),
        (f"{OPEN}\n{CALL}\n{OPEN}{CLOSE}", "out of place"),
        (f"{OPEN}\n{F}\n{F}\n{A}x{DONE}\n{END}\n{CLOSE}", "repeated"),
        (f"{OPEN}\n{F}\n{OPEN}{A}x{DONE}\n{END}\n{CLOSE}", "out of place"),
        (f"{OPEN}\n{F}\n{A}{A}x{DONE}\n{END}\n{CLOSE}", "repeated"),
        (f"{OPEN}\n{F}\n{A}x{DONE}{DONE}\n{END}\n{CLOSE}", "out of place"),
        (f"{OPEN}\n{F}\n{A}x</{DSML}value>\n{END}\n{CLOSE}", "taken for the end"),
        (f"{OPEN}\n{F}\n{A.replace('parameter', 'param')}x{DONE}\n{END}\n{CLOSE}", "taken for a parameter"),
        (f"{OPEN}\n{F}\n{A}x<{DSML}b>{DONE}\n{END}\n{CLOSE}", "left out"),
        (f"{OPEN}\n{F}\n{A}{OPEN}x{DONE}\n{END}\n{CLOSE}", "left out"),
        (f"{OPEN}\n{CALL}\n{END}\n{CLOSE}", "left out"),
        (f"{BLOCK}\n{CLOSE}", "ends nothing"),
        (f"{BLOCK}\n</think>\n", "ended twice"),
        (CALL, "no tool block around"),
        (f"{CALL}\n{CLOSE}", "no tool block around"),
        (f'{OPEN}{F}{{"a": "x"}}{END}{CLOSE}', "in place of parameters"),
        (f'{OPEN}{F}{A.replace(chr(34) + "a", chr(34) + "input")}{{"a": "x"}}{DONE}{END}{CLOSE}', "wrapped"),
        (f"{OPEN}{F}{A}x{DONE}{A}y{DONE}{END}{CLOSE}", "given twice"),
    ],
)
def test_repairs(text, note):
    reasoning, content, calls, notes = read(f"A\n\n{text}{EOS}")
    assert (reasoning, content, calls) == (None, "A", X)
    assert any(note in said for said in notes)


def test_a_missing_end_before_the_next_beginning():
    two = [*X, ("f", '{"a": "y"}')]
    assert read(f"{OPEN}\n{F}\n{A}x\n{F}\n{A}y{DONE}\n{END}\n{CLOSE}")[2] == two
    assert read(f"{OPEN}\n{F}\n{A}x{DONE}\n{F}\n{A}y{DONE}\n{END}\n{CLOSE}")[2] == two
    assert read(f"{OPEN}\n{F}\n{A}x\n{B}1\n{END}\n{CLOSE}")[2] == [("f", '{"a": "x", "b": 1}')]
    assert read(f"{BLOCK}\n\n{BLOCK}")[2] == X * 2


@pytest.mark.parametrize(
    "text",
    [
        f"see {OPEN} and",
        f"see\n\n{OPEN}\n\nand\n\n{OPEN} {CLOSE[:5]}",
        f"see {CLOSE}",
        f"see <{DSML}other> and <{DSML} and </{DSML}",
        f'see <{DSML}invoke name="no tool">',
        f"see {A}x{DONE}",
        f"see <{DSML}invoke name=",
        f"see {THINK} and {END_THINK}",
        f"see {OPEN}\n<{DSML}other>",
        f"see {OPEN}",
    ],
)
def test_what_is_no_call_is_text_with_a_note(text):
    reasoning, content, calls, notes = read(text)
    assert (reasoning, content, calls) == (None, text, [])
    assert notes


def test_text_around_and_between_calls():
    _, content, calls, notes = read(f"A\n\n{BLOCK}\n\nB")
    assert (content, calls) == ("A\n\nB", X)
    assert len(notes) == 1
    _, content, calls, _ = read(f"{OPEN}\n{CALL}\nand {CALL}\n<{DSML}other>{B}{CLOSE}")
    assert (content, calls) == (f"and <{DSML}other>{B}", X * 2)
    _, content, calls, _ = read(f"{OPEN}{F}so {A}x{DONE} is <{DSML}it> {END}{CLOSE}")
    assert (content, calls) == (f"so  is <{DSML}it>", X)
    assert read(f"{OPEN}{F}so{END}{CLOSE}")[1:3] == ("so", [("f", "{}")])
    # No tag enters an argument, not even out of JSON that stands in place of parameters.
    assert DSML not in read(f'{OPEN}{F}{{"a": "<{DSML}b>"}}{END}{CLOSE}')[2][0][1]


def test_tools_that_are_not_on_offer():
    other = BLOCK.replace('"f"', '"g"')
    assert read(other) == (None, "", [("g", '{"a": "x"}')], ["there is no tool g"])
    assert read(other, tools=()) == (None, "", [("g", '{"a": "x"}')], [])
    assert read(CALL, tools=())[2] == X


def test_a_block_without_calls():
    assert read(f"A\n\n{OPEN}\n{CLOSE}") == (None, "A", [], ["a tool block has no calls"])


@pytest.mark.parametrize(
    "text",
    [
        f"{OPEN}\n{F}\n{A}x",  # in a value
        f"{OPEN}\n{F}\n{B}1{DONE}",  # without what f requires
        f"{OPEN}\n{F}\n{A}x{DONE}\n<{DSML}param",
        f'{OPEN}\n{F}\n{{"a": "x"',
    ],
)
def test_a_call_that_the_text_ends_in_has_no_end(text):
    events = events_of(text)
    assert CallBegin(0, "f") in events
    assert CallEnd(0) not in events
    assert any("ended in call f" in event.text for event in events if isinstance(event, Note))


def test_nothing_is_guessed_about_a_text_that_was_cut():
    text = f"{OPEN}\n{F}\n{A}x{DONE}"
    assert CallEnd(0) in events_of(text)
    assert CallEnd(0) not in events_of(text, cut=True)
    assert read(f"T{BLOCK}", thinking=True, cut=True)[:3] == (f"T{BLOCK}", "", [])


def test_thinking_that_begins_or_ends_twice():
    twice = ["thinking began twice"]
    assert read(f"\n{THINK}T{THINK}{END_THINK}A", thinking=True) == (f"T{THINK}", "A", [], twice)
    assert read(f"T{END_THINK}\n {END_THINK}\n\nA", thinking=True) == ("T", "\n\nA", [], ["thinking ended twice"])
    assert read(f" {THINK}T{END_THINK}A") == ("T", "A", [], ["thinking began after its end"])
    assert read(f"T{END_THINK}{THINK}U{END_THINK}A", thinking=True)[:2] == ("TU", "A")
    assert read("T", thinking=True) == ("T", "", [], ["the text ended in thoughts"])
    assert read(" ", thinking=True)[:2] == (" ", "")


def test_a_block_in_thoughts_that_do_not_end_is_recovered_once():
    assert read(f"T\n\n{BLOCK}", thinking=True)[:3] == ("T", "", X)
    assert read(f"T\n\n{CALL}{EOS}", thinking=True)[:3] == ("T", "", X)
    assert read(f"T\n\n{BLOCK}U\n\n{BLOCK}", thinking=True)[:3] == (f"TU\n\n{BLOCK}", "", X)
    assert read(f"T\n\n{OPEN}\nso\n{CALL}and{CLOSE}U", thinking=True)[1] == ""
    # Thoughts about a call are thoughts if they end.
    text = f"T\n\n{BLOCK}\n\n{OPEN}U"
    assert read(f"{text}{END_THINK}A\n\n{BLOCK}", thinking=True) == (text, "A", X, [])
    assert read(f"T {OPEN} U", thinking=True)[:3] == (f"T {OPEN} U", "", [])
    assert read(f"T {CALL.replace('f', 'g')}", thinking=True)[1:3] == ("", [])
    assert read(f"T {CALL}", thinking=True, tools=())[:3] == (f"T {CALL}", "", [])


def test_the_end_token_counts_at_the_end_only():
    assert read(f"A{EOS}B{EOS}") == (None, f"A{EOS}B", [], [])
    assert read(EOS[:-1]) == (None, EOS[:-1], [], [])
    assert read(f"{OPEN}{F}{A}x{EOS}y{DONE}{END}{CLOSE}{EOS}")[2] == [("f", f'{{"a": "x{EOS}y"}}')]


def test_bytes_that_are_no_text():
    parser = Parser(thinking=False)
    events = [*parser.push(b"a\xff\xe6\xb0"), *parser.push("b"), *parser.push(b"\xe6"), *parser.finish()]
    assert joined(events) == [Content("a\ufffd\ufffdb\ufffd")]
