"""Two properties over generated conversations: parsing undoes encoding, and no way to cut the text matters."""

import json
import re

from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4.text.encode import Special, assistant_text, encode, to_json
from dsv4.text.events import CallArguments, CallBegin, CallEnd, Content, Note, Reasoning, message_of
from dsv4.text.markup import MARK
from dsv4.text.message import Message, Tool, ToolCall
from dsv4.text.parse import Parser, parse
from dsv4.text.passages import OWN
from dsv4.text.tokens import ASSISTANT, DSML, END_THINK, EOS, THINK

SNIPPETS = [
    "a", "Bern ", "\n", "\n\n", " ", "<", "</", ">", "think>", "\uff5c", "DSML", EOS[:-1], EOS, '"', "\\", "{", "}",
    "1", "\u00e9", "\u6c34", "\U0001f600", "name=", '" string="true">', "<tool_result>", "\x00", "\u2028",
]  # fmt: skip

texts = st.lists(st.sampled_from(SNIPPETS), max_size=6).map("".join).filter(lambda text: not MARK.search(text))
# A key ends where its quotes do; the format has no way to write one that spells the end of its tag.
keys = texts.filter(lambda key: not re.search('\uff5c|" |">', key))
names = st.from_regex(r"[a-zA-Z0-9_-]{1,9}", fullmatch=True)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=4,
).filter(lambda value: not MARK.search(to_json(value)))
calls = st.builds(ToolCall, name=names, arguments=st.dictionaries(keys, values, max_size=4).map(to_json))
answers = st.builds(
    Message,
    role=st.just("assistant"),
    content=texts,
    reasoning=st.none() | texts.filter(bool),
    tool_calls=st.lists(calls, max_size=3).map(tuple),
)

TAGS = [
    f"{side}{DSML}{tag}>" for side in ("<", "</") for tag in ("tool_calls", "invoke", "parameter", "x", "toolcalls")
]
TAGS += [
    THINK,
    END_THINK,
    f"<{DSML}",
    "<",
    EOS,
    "\n\n",
    "\n",
    " ",
    "a",
    "\u6c34",
    '{"a": 1}',
    '{"input": {"a": "x"}}',
    '"',
]
TAGS += [f'<{DSML}invoke name="{name}">' for name in ("f", "g")]
TAGS += [f'<{DSML}parameter name="{key}" string="{flag}">' for key in ("a", "input") for flag in ("true", "false", "?")]
soups = st.lists(st.sampled_from(TAGS), max_size=14).map("".join)
TOOLS = (Tool(function={"name": "f", "parameters": {"properties": {"a": {}}, "required": ["a"]}}),)


def events_of(pieces, **options):
    """The events of a text in pieces, with those of a kind that follow one another as one."""
    parser = Parser(**options)
    events = [event for piece in pieces for event in parser.push(piece)] + parser.finish()
    result = []
    for event in events:
        match event, result[-1] if result else None:
            case (Content(text), Content(before)) | (Reasoning(text), Reasoning(before)):
                result[-1] = type(event)(before + text)
            case CallArguments(i, text), CallArguments(j, before) if i == j:
                result[-1] = CallArguments(i, before + text)
            case _:
                result.append(event)
    return result


def assert_cuts_do_not_matter(text, **options):
    data = text.encode()
    whole = events_of([text], **options)
    assert events_of([bytes([byte]) for byte in data], **options) == whole
    assert events_of(list(text), **options) == whole
    for cut in range(1, len(data)):
        assert events_of([data[:cut], data[cut:]], **options) == whole, f"cut at {cut}"
    return whole


@settings(max_examples=60, deadline=None, derandomize=True)
@given(answers, st.booleans())
def test_parsing_undoes_encoding(message, thinking):
    message = message if thinking else Message(role="assistant", content=message.content, tool_calls=message.tool_calls)
    assert parse(assistant_text(message, thinking=thinking).text, thinking=thinking) == message


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.lists(st.tuples(texts, answers), min_size=1, max_size=3), st.booleans())
def test_whole_conversations_come_back(talk, thinking):
    messages = [message for text, answer in talk for message in (Message(role="user", content=text), answer)]
    prompt = encode(messages, thinking=thinking, passages=OWN, drop_thinking=False)
    turns, opened = [], THINK if thinking else END_THINK
    for i, part in enumerate(prompt.parts):
        if part == Special(ASSISTANT):
            turns.append("")
            assert prompt.parts[i + 1].text == opened
        elif turns:
            turns[-1] += part if isinstance(part, str) else part.text
    assert len(turns) == len(talk)
    for turn, (_, answer) in zip(turns, talk, strict=True):
        written = assistant_text(answer, thinking=thinking).text
        assert turn.startswith(opened + written)
        read = parse(turn[len(opened) : len(opened) + len(written)], thinking=thinking)
        assert (read.content, read.tool_calls) == (answer.content, answer.tool_calls)
        assert read.reasoning == (answer.reasoning if thinking else None)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(answers, st.booleans())
def test_no_cut_of_a_good_completion_matters(message, thinking):
    assert_cuts_do_not_matter(assistant_text(message, thinking=thinking).text, thinking=thinking)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(soups, st.booleans(), st.sampled_from([(), TOOLS]))
def test_no_cut_of_a_bad_one_matters_and_what_comes_out_is_sound(text, thinking, tools):
    events = assert_cuts_do_not_matter(text, thinking=thinking, tools=tools)
    arguments, begun, ended = {}, [], []
    for event in events:
        match event:
            case CallBegin(index, name):
                assert index == len(begun)
                assert name
                begun.append(index)
                arguments[index] = ""
            case CallArguments(index, piece):
                assert index not in ended
                arguments[index] += piece
                assert f"<{DSML}" not in arguments[index]
                assert f"</{DSML}" not in arguments[index]
            case CallEnd(index):
                ended.append(index)
                assert isinstance(json.loads(arguments[index]), dict)
            case Note(note):
                assert note
            case Content(piece) if thinking:
                assert END_THINK in text
    assert len(message_of(events).tool_calls) == len(ended)
