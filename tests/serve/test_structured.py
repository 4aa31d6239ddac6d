"""Answers held to a form, by a model that would say anything: tools in every mode, and JSON after thinking."""

import json

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
