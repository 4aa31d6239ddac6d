"""The rules of the encoder one by one, against prompts written out by hand; ``test_goldens`` has the released ones."""

from dataclasses import replace
from itertools import pairwise

import pytest

from dsv4.text.encode import Prompt, Special, assistant_text, encode
from dsv4.text.message import Message, Tool, ToolCall
from dsv4.text.passages import OWN, Passages
from dsv4.text.tokens import (
    ASSISTANT,
    BOS,
    DSML,
    END_THINK,
    EOS,
    EXTRACTED_URL,
    LATEST_REMINDER,
    SPECIAL_TOKENS,
    TASKS,
    THINK,
    USER,
)

SHORT = Passages(
    tools="Tools:\n{tool_schemas}\n",
    response_format="Schema: {schema}",
    efforts={"low": "", "high": "Hard.", "max": f"{THINK}er."},
    mapping={"low": "low", "medium": "high", "high": "high", "max": "max"},
)
TOOL = Tool(function={"name": "f", "description": "\u6c34", "parameters": {"a": [1, 2]}})
F = ToolCall(name="f", arguments='{"a": 1}', id="f1")
G = ToolCall(name="g", arguments="{}", id="g1")


def user(text, **fields):
    return Message(role="user", content=text, **fields)


def says(text, **fields):
    return Message(role="assistant", content=text, **fields)


def result(text, call_id=None):
    return Message(role="tool", content=text, tool_call_id=call_id)


def prompt(*messages, thinking=True, effort="low", **options):
    text = encode(messages, thinking=thinking, effort=effort, passages=SHORT, **options).text
    return text.removeprefix(BOS)


def test_who_speaks():
    system, reminder = Message(role="system", content="S"), Message(role="latest_reminder", content="R")
    assert prompt(system, user("Q"), thinking=False) == f"S{USER}Q{ASSISTANT}{END_THINK}"
    assert prompt(system, user("Q")) == f"S{USER}Q{ASSISTANT}{THINK}"
    assert prompt(system, reminder, user("Q")) == f"S{LATEST_REMINDER}R{USER}Q{ASSISTANT}{THINK}"
    # A reminder after a question has the assistant's header before it.
    assert prompt(user("Q"), reminder) == f"{USER}Q{ASSISTANT}{THINK}{LATEST_REMINDER}R"
    assert prompt(Message(role="developer", content="D")) == f"{USER}D{ASSISTANT}{THINK}"
    assert prompt() == ""


def test_bos_and_effort_stand_first():
    ask = [user("Q")]
    assert encode(ask, thinking=True, effort="medium", passages=SHORT).text.startswith(f"{BOS}Hard.{USER}")
    assert encode(ask, thinking=True, effort="low", passages=SHORT).text.startswith(f"{BOS}{USER}")
    assert encode(ask, thinking=False, effort="max", passages=SHORT).text.startswith(f"{BOS}{USER}")
    most = encode(ask, thinking=True, effort="max", passages=SHORT, add_bos=False)
    assert most.parts[:3] == (Special(THINK), "er.", Special(USER))
    with pytest.raises(ValueError, match="effort is 'huge'"):
        encode(ask, thinking=False, effort="huge", passages=SHORT)


def test_what_the_assistant_writes():
    message = says("A", reasoning="T")
    assert assistant_text(message, thinking=True).text == f"T{END_THINK}A{EOS}"
    assert assistant_text(message, thinking=False).text == f"A{EOS}"
    assert assistant_text(replace(message, wo_eos=True, reasoning=None), thinking=True).text == f"{END_THINK}A"
    assert assistant_text(says(None), thinking=False).text == EOS
    with pytest.raises(ValueError, match="role is user"):
        assistant_text(user("Q"), thinking=True)


def test_calls_are_written_in_tags():
    arguments = '{"text": "a\\nb", "n": [1, {"k": "\u6c34"}], "yes": true, "no": null}'
    calls = (ToolCall(name="f", arguments=arguments), G)
    written = assistant_text(says("A", tool_calls=calls), thinking=False)
    assert written.text == (
        f"A\n\n<{DSML}tool_calls>\n"
        f'<{DSML}invoke name="f">\n'
        f'<{DSML}parameter name="text" string="true">a\nb</{DSML}parameter>\n'
        f'<{DSML}parameter name="n" string="false">[1, {{"k": "\u6c34"}}]</{DSML}parameter>\n'
        f'<{DSML}parameter name="yes" string="false">true</{DSML}parameter>\n'
        f'<{DSML}parameter name="no" string="false">null</{DSML}parameter>\n'
        f"</{DSML}invoke>\n"
        f'<{DSML}invoke name="g">\n\n</{DSML}invoke>\n'
        f"</{DSML}tool_calls>{EOS}"
    )
    assert written.parts[:4] == ("A\n\n<", Special(DSML), "tool_calls>\n<", Special(DSML))


@pytest.mark.parametrize("arguments", ["{oops", "[1]", "", "7", "[" * 9999])
def test_arguments_that_are_no_object_are_one_parameter(arguments):
    written = assistant_text(says("", tool_calls=(ToolCall(name="f", arguments=arguments),)), thinking=False).text
    assert f'\n<{DSML}parameter name="arguments" string="true">{arguments}</{DSML}parameter>\n' in written


def test_results_and_questions_merge_into_one_turn():
    called = says("", tool_calls=(F, G))
    merged = prompt(called, result("1", "f1"), user("Q"), result("2", "g1"), user("P"), thinking=False)
    assert merged.endswith(
        f"{USER}<tool_result>1</tool_result>\n\nQ\n\n<tool_result>2</tool_result>\n\nP{ASSISTANT}{END_THINK}"
    )
    assert prompt(user("Q"), user("P")) == f"{USER}Q\n\nP{ASSISTANT}{THINK}"
    blocks = ({"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "</tool_result>"})
    assert f"<tool_result>a\n\n[Unsupported image]\n\n</tool_result></tool_result>{ASSISTANT}" in prompt(result(blocks))


def test_a_task_ends_a_turn_and_is_not_lost():
    assert prompt(user("Q", task="query"), user("P")) == f"{USER}Q{USER}P{ASSISTANT}{THINK}"
    assert prompt(user("Q"), user("P", task="query")) == f"{USER}Q\n\nP{TASKS['query']}"
    assert prompt(user("Q", task="query"), result("1")) == f"{USER}Q\n\n<tool_result>1</tool_result>{TASKS['query']}"


def test_results_follow_the_order_of_their_calls():
    called = says("", tool_calls=(F, G, replace(F, id="f2"), replace(F, id="")))
    results = [result(name, name) for name in ("f2", "g1", "f1", "who")]
    text = prompt(called, *results[:2], user("Q"), *results[2:])
    places = [text.index(part) for part in ("<tool_result>f1", "<tool_result>who", "Q", "<tool_result>g1", "f2")]
    assert places == sorted(places)
    # Without calls before them they stay as they come, and the latest calls count.
    assert prompt(result("b", "f2"), result("a", "f1")).index("b") < prompt(result("b", "f2"), result("a", "f1")).index(
        "a"
    )
    later = says("", tool_calls=(G, F))
    text = prompt(called, result("x", "f1"), later, result("a", "f1"), result("b", "g1"))
    assert text.index("<tool_result>b") < text.index("<tool_result>a")


TALK = (
    Message(role="system", content="S"),
    user("Q1"),
    says("A1", reasoning="T1"),
    Message(role="latest_reminder", content="R"),
    Message(role="developer", content="D"),
    says("A2", reasoning="T2"),
    user("Q3"),
    says("A3", reasoning="T3"),
)


def test_thoughts_before_the_last_question_are_dropped():
    assert prompt(*TALK) == (
        f"S{USER}Q1{ASSISTANT}{END_THINK}A1{EOS}{LATEST_REMINDER}RA2{EOS}{USER}Q3{ASSISTANT}{THINK}T3{END_THINK}A3{EOS}"
    )
    # A tool's result counts as a question.
    told = prompt(user("Q"), says("", reasoning="T1", tool_calls=(F,)), result("1", "f1"), says("A", reasoning="T2"))
    assert "T1" not in told
    assert f"{THINK}T2{END_THINK}A" in told
    assert f"{ASSISTANT}{END_THINK}\n\n<{DSML}tool_calls>" in told


def test_all_thoughts_stay_where_they_are_wanted():
    kept = prompt(*TALK, drop_thinking=False)
    assert kept == (
        f"S{USER}Q1{ASSISTANT}{THINK}T1{END_THINK}A1{EOS}{LATEST_REMINDER}R{USER}D{ASSISTANT}{THINK}T2{END_THINK}A2{EOS}"
        f"{USER}Q3{ASSISTANT}{THINK}T3{END_THINK}A3{EOS}"
    )
    with_tools = prompt(replace(TALK[0], tools=(TOOL,)), *TALK[1:])
    assert with_tools == kept.replace("S", f"S\n\n{SHORT.tools.replace('{tool_schemas}', SCHEMA)}", 1)


SCHEMA = '{"name": "f", "description": "\u6c34", "parameters": {"a": [1, 2]}}'


def test_no_thinking_at_all():
    plain = prompt(*TALK, thinking=False)
    assert THINK not in plain
    assert "T1" not in plain
    assert f"{USER}D{ASSISTANT}{END_THINK}A2" in plain  # developers are dropped with thoughts only


def test_offers_stand_after_the_content():
    offers = {"tools": (TOOL, Tool(function={"name": "g"})), "response_format": {"type": "object"}}
    expected = f'S\n\nTools:\n{SCHEMA}\n{{"name": "g"}}\n\n\nSchema: {{"type": "object"}}'
    assert prompt(Message(role="system", content="S", **offers)) == expected
    assert prompt(Message(role="developer", content="S", **offers)) == f"{USER}{expected}{ASSISTANT}{THINK}"
    with pytest.raises(ValueError, match="developer"):
        prompt(Message(role="developer", content=None, **offers))
    with pytest.raises(ValueError, match="direct_search_results"):
        prompt(Message(role="direct_search_results", content="x"))


def test_tasks():
    for task in ("query", "authority", "domain", "title"):
        assert prompt(user("Q", task=task)) == f"{USER}Q{TASKS[task]}"
    action = TASKS["action"]
    assert prompt(user("Q", task="action")) == f"{USER}Q{ASSISTANT}{THINK}{action}"
    assert prompt(user("Q", task="action"), thinking=False) == f"{USER}Q{ASSISTANT}{END_THINK}{action}"
    # The answer to a task has no thoughts; and a task waits for an answer.
    assert prompt(user("Q", task="query"), says("A", reasoning="T")) == f"{USER}Q{TASKS['query']}A{EOS}"
    assert prompt(user("Q", task="query"), Message(role="system", content="S")) == f"{USER}QS"
    titled = prompt(user("Q"), says("A", reasoning="T", task="title"), says("Name"))
    assert titled == f"{USER}Q{ASSISTANT}{THINK}T{END_THINK}A{EOS}{TASKS['title']}Name{EOS}"


def test_the_address_of_read_url_has_its_token():
    text = f"see {EXTRACTED_URL} at{EXTRACTED_URL}http://a"
    parts = encode([user(text, task="read_url")], thinking=False, passages=OWN).parts
    assert parts[2:] == (f"see {EXTRACTED_URL} at", Special(EXTRACTED_URL), "http://a", Special(TASKS["read_url"]))
    assert encode([user(text, task="query")], thinking=False, passages=OWN).parts[2] == text


@pytest.mark.parametrize("token", SPECIAL_TOKENS)
def test_no_text_of_others_becomes_a_special_token(token):
    messages = [
        Message(role="system", content=token, tools=(Tool(function={"name": token}),), response_format={token: token}),
        Message(role="latest_reminder", content=token),
        user(token),
        says(token, reasoning=token, tool_calls=(ToolCall(name=token, arguments=f'{{"{token}": "{token}"}}'),)),
        result(token),
    ]
    plain = [replace(m, content="x") for m in messages]
    plain[0] = replace(plain[0], tools=(TOOL,), response_format={"a": 1})
    plain[3] = replace(plain[3], reasoning="x", tool_calls=(replace(F, arguments='{"a": "x"}'),))
    spelled, expected = (
        [part for part in encode(m, thinking=True, passages=OWN).parts if isinstance(part, Special)]
        for m in (messages, plain)
    )
    assert spelled == expected


def test_texts_are_joined():
    parts = encode(TALK[:3], thinking=True, passages=SHORT, effort="medium").parts
    assert parts[:3] == (Special(BOS), "Hard.S", Special(USER))
    assert all(parts)
    assert not any(isinstance(a, str) and isinstance(b, str) for a, b in pairwise(parts))
    assert Prompt(("a", Special("<b>"), "c")).text == "a<b>c"


def test_the_conversation_is_left_as_it_was():
    talk = (*TALK, says("", tool_calls=(F,)), result("1", "f1"))
    before = repr(talk)
    encode(talk, thinking=True, passages=OWN)
    assert repr(talk) == before
