"""Answers held to a form, by a model that would say anything: tools in every mode, and JSON after thinking."""

import asyncio
import json
import threading

import httpx
import pytest

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 6}, "days": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["city", "days"], "additionalProperties": False,
}  # fmt: skip
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "strict": True, "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "nothing", "strict": True, "parameters": NOTHING}},
]


@pytest.fixture
def ask(http, service):
    """Ask for an answer that is soon to end its thinking."""

    def run(thinking, **given):
        end = service.tokenizer.token_to_id("</think>")
        bias = {str(end): 8} if thinking else {}
        answer = http("POST", "/v1/chat/completions", json={
            "model": "toy", "messages": [{"role": "user", "content": "Berlin?"}], "logit_bias": bias, "seed": 1,
            "thinking": {"type": "enabled" if thinking else "disabled"}, "max_tokens": 1200, **given,
        }).json()  # fmt: skip
        assert "error" not in answer, answer
        return answer["choices"][0]

    return run


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_schema_is_kept(ask, thinking, seed):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    choice = ask(thinking, response_format=form, seed=seed)
    found = json.loads(choice["message"]["content"])
    assert set(found) == {"city", "days"}
    assert isinstance(found["city"], str)
    assert 0 <= found["days"] <= 9
    assert choice["finish_reason"] == "stop"
    assert ("reasoning_content" in choice["message"]) <= thinking


@pytest.mark.parametrize("thinking", [False, True])
def test_a_call_is_required(ask, thinking):
    choice = ask(thinking, tools=TOOLS[:1], tool_choice={"type": "function", "function": {"name": "weather"}})
    (call,) = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls"
    assert call["function"]["name"] == "weather"
    assert set(json.loads(call["function"]["arguments"])) == {"city", "days"}
    assert choice["message"]["content"] is None


@pytest.mark.parametrize("thinking", [False, True])
def test_some_call_is_required(ask, thinking):
    choice = ask(thinking, tools=TOOLS[1:], tool_choice="required")
    assert choice["finish_reason"] in ("tool_calls", "length")
    calls = choice["message"]["tool_calls"]
    assert {call["function"]["name"] for call in calls} == {"nothing"}
    assert {call["function"]["arguments"] for call in calls} == {"{}"}


def test_a_schema_that_cannot_be_kept_is_refused(http):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no such type"}}}
    answer = http("POST", "/v1/chat/completions", json={
        "model": "toy", "messages": [{"role": "user", "content": "x"}], "response_format": form})  # fmt: skip
    assert answer.status_code == 400
    assert "no such type" in answer.json()["error"]["message"]


@pytest.fixture
def compiling(service, monkeypatch):
    """Let grammars compile only once a test lets them: what was begun, and the event that does so."""
    begun, gate, matcher = [], threading.Event(), service.grammars._vocabulary.matcher

    def slow(text, name):
        begun.append(text)
        assert gate.wait(30), "nobody let the grammar compile"
        return matcher(text, name)

    monkeypatch.setattr(service.grammars._vocabulary, "matcher", slow)
    return begun, gate


async def asked_of(app, *bodies):
    """Begin to ask for chat answers, all at once."""
    client = httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://localhost", timeout=60)
    fixed = {"model": "toy", "messages": [{"role": "user", "content": "x"}], "reasoning_effort": "none", "seed": 1}
    return client, [asyncio.create_task(client.post("/v1/chat/completions", json={**fixed, **one})) for one in bodies]


JSON_FORM = {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}}
CALL_FORM = {"tools": TOOLS[:1], "tool_choice": "required"}


@pytest.mark.parametrize("form", [JSON_FORM, CALL_FORM], ids=["json", "call"])
def test_a_grammar_that_compiles_keeps_nobody_waiting(app, service, compiling, form):
    """Other requests run to their ends meanwhile."""
    begun, gate = compiling

    async def run():
        client, (slow,) = await asked_of(app, form)
        async with client:
            try:
                while not begun:
                    await asyncio.sleep(0.001)
                other, (plain,) = await asked_of(app, {"max_tokens": 5})
                async with other:
                    assert (await plain).json()["usage"]["completion_tokens"] <= 5
                assert not slow.done()
            finally:
                gate.set()
            return (await slow).json()["choices"][0]["finish_reason"]

    assert asyncio.run(run()) in ("stop", "tool_calls")


def test_a_grammar_that_many_want_is_compiled_once(app, service, compiling):
    """All of them wait for it, and get the same answer; a later one finds it."""
    begun, gate = compiling

    async def run():
        client, tasks = await asked_of(app, *[JSON_FORM] * 4)
        async with client:
            try:
                while not begun:
                    await asyncio.sleep(0.001)
                await asyncio.sleep(0.1)  # time for the others to begin one of their own
            finally:
                gate.set()
            answers = [await task for task in tasks]
            client_again, again = await asked_of(app, JSON_FORM)
            async with client_again:
                return [answer.json()["choices"][0]["message"]["content"] for answer in (*answers, await again[0])]

    found = asyncio.run(run())
    assert len(begun) == 1
    assert len(set(found)) == 1
    assert set(json.loads(found[0])) == {"city", "days"}


def test_a_grammar_that_cannot_be_compiled_is_told_to_all_who_want_it(app):
    wrong = {"name": "x", "schema": {"type": "no such type"}}

    async def run():
        client, tasks = await asked_of(app, *[{"response_format": {"type": "json_schema", "json_schema": wrong}}] * 3)
        async with client:
            return [await task for task in tasks]

    assert [answer.status_code for answer in asyncio.run(run())] == [400] * 3
