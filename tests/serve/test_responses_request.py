"""What requests of the Responses protocol become, and what is refused."""

import json

import pytest

from dsv4.serve.errors import ApiError
from dsv4.serve.responses_request import ResponsesRequest, custom_tools, turn_of
from dsv4.text.message import Message, ToolCall

ASK = {"model": "toy", "input": "What is the weather in Berlin?"}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
WEATHER = {"type": "function", "name": "weather", "description": "Tell it.", "parameters": SCHEMA, "strict": False}
PATCH = {
    "type": "custom", "name": "apply_patch", "description": "Change files.",
    "format": {"type": "grammar", "syntax": "lark", "definition": "start: /.+/"},
}  # fmt: skip


def request_of(**fields):
    return ResponsesRequest.model_validate({**ASK, **fields})


def messages_of(*items, **fields):
    return turn_of(request_of(input=list(items), **fields)).messages


def user(text):
    return {"role": "user", "content": text}


def test_items_of_the_assistant_are_one_message():
    thought = {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]}
    said = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I call."}]}
    calls = [
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city": "Oslo"}'},
        {"type": "custom_tool_call", "call_id": "c2", "name": "apply_patch", "input": 'a "b"'},
    ]
    outputs = [
        {"type": "function_call_output", "call_id": "c1", "output": "3"},
        {"type": "custom_tool_call_output", "call_id": "c2",
         "output": [{"type": "input_text", "text": "done"}, {"type": "input_image", "image_url": "data:"}]},
    ]  # fmt: skip
    found = messages_of(user("?"), thought, said, *calls, *outputs)
    assert [message.role for message in found] == ["user", "assistant", "tool", "tool"]
    assert (found[1].reasoning, found[1].text) == ("Hm.", "I call.")
    assert found[1].tool_calls == (
        ToolCall(name="weather", arguments='{"city": "Oslo"}', id="c1"),
        ToolCall(name="apply_patch", arguments='{"input": "a \\"b\\""}', id="c2"),
    )
    assert [(message.tool_call_id, message.text) for message in found[2:]] == [
        ("c1", "3"), ("c2", "done\n\n[Unsupported input_image]"),
    ]  # fmt: skip


def test_messages_of_the_system_are_one_and_a_last_one_is_asked():
    found = messages_of({"role": "developer", "content": "A"}, {"role": "system", "content": "B"}, user("?"))
    assert [(message.role, message.text) for message in found] == [("system", "A\n\nB"), ("user", "?")]
    found = messages_of({"role": "developer", "content": "A"}, instructions="I")
    assert [(message.role, message.text) for message in found] == [("system", "I"), ("user", "A")]


def test_a_summary_stands_for_thoughts_that_are_not_there():
    summary = [{"type": "summary_text", "text": "Short."}]
    thought = {"type": "reasoning", "summary": summary}
    assert messages_of(user("?"), thought, user("!"))[1] == Message(role="assistant", content="", reasoning="Short.")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"input": []}, "input has no message"),
        ({"input": [{"type": "web_search_call"}]}, "input has no message"),
        ({"input": [user("?"), {"role": "assistant", "content": "Well"}]}, "input ends with what the assistant said"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "item_reference, but no items are kept"),
        ({"conversation": "conv_1"}, "conversation is given, but no"),
        ({"previous_response_id": "resp_1"}, "previous_response_id is given, but no"),
        ({"tools": [WEATHER, {**PATCH, "name": "weather"}]}, "tools has 'weather' twice"),
        ({"tools": [{"type": "web_search"}], "tool_choice": "required"}, "tool_choice is 'required' without tools"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "time"}}, "tool_choice names 'time'"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format has no schema"),
        ({"tools": [WEATHER], "tool_choice": {"type": "allowed_tools", "tools": [{"type": "function", "name": "x"}]}},
         "tool_choice names 'x'"),
    ],
)  # fmt: skip
def test_what_cannot_be_had_is_refused(fields, message):
    with pytest.raises(ApiError, match=message) as raised:
        turn_of(request_of(**fields))
    assert raised.value.status == 400


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"input": 5}, "input"),
        ({"input": [{"type": "message", "role": "judge", "content": ""}]}, "input.0.message.role"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input.0.call.call_id"),
        ({"input": ["text"]}, "input.0.other"),
        ({"input": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "input.0.message.content.0.text"),
        ({"tools": [{"type": "function"}]}, "tools.0.function.name"),
        ({"temperature": 3}, "temperature"),
        ({"tool_choice": "any"}, "tool_choice.type"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice.type"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_with_its_place(http, fields, place):
    answer = http("POST", "/v1/responses", json=ASK | fields)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, place)


@pytest.mark.parametrize(
    ("reasoning", "thinking", "effort"),
    [(None, True, "high"), ({"effort": None, "summary": "auto"}, True, "high"), ({"effort": "none"}, False, "high"),
     ({"effort": "xhigh"}, True, "xhigh"), ({"effort": "minimal"}, True, "minimal")],
)  # fmt: skip
def test_efforts(http, says, reasoning, thinking, effort):
    turn = turn_of(request_of(reasoning=reasoning))
    assert (turn.thinking, turn.effort) == (thinking, effort)
    asked = says("Fine.")
    assert http("POST", "/v1/responses", json=ASK | {"reasoning": reasoning}).status_code == 200
    assert asked[0]["prompt"].endswith("<think>" if thinking else "</think>")


def test_an_unknown_effort_is_refused(http):
    answer = http("POST", "/v1/responses", json=ASK | {"reasoning": {"effort": "huge"}})
    assert answer.status_code == 400
    assert "effort is 'huge'; expected one of minimal" in answer.json()["error"]["message"]


def test_choices_of_tools():
    tools = [WEATHER, PATCH]

    def offered(choice):
        turn = turn_of(request_of(tools=tools, tool_choice=choice))
        return [tool.name for tool in turn.tools], turn.tool_choice.kind, turn.tool_choice.name

    both = ["weather", "apply_patch"]
    assert offered(None) == offered("auto") == (both, "auto", "")
    assert offered("required") == (both, "required", "")
    assert offered({"type": "custom", "name": "apply_patch"}) == (both, "named", "apply_patch")
    some = [{"type": "custom", "name": "apply_patch"}, {"type": "mcp", "server_label": "deepwiki"}]
    allowed = {"type": "allowed_tools", "mode": "required", "tools": some}
    assert offered(allowed) == (["apply_patch"], "required", "")


def test_users_are_kept_apart_and_cache_keys_are_not():
    assert turn_of(request_of(user="a")).user == "a"
    assert turn_of(request_of(user="a", safety_identifier="b")).user == "b"
    assert turn_of(request_of(prompt_cache_key="k")).user == ""


def test_limits_formats_and_one_call():
    turn = turn_of(request_of(max_output_tokens=7, temperature=0.5, top_p=0.25, seed=3, parallel_tool_calls=False))
    sampling = turn.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.seed) == (7, 0.5, 0.25, 3)
    assert turn.one_call
    assert not turn_of(request_of(parallel_tool_calls=True)).one_call
    wanted = {"type": "json_schema", "name": "a", "schema": SCHEMA, "strict": True}
    answer = turn_of(request_of(text={"format": wanted, "verbosity": "low"})).answer
    assert (answer.kind, answer.schema) == ("json_schema", SCHEMA)
    assert turn_of(request_of(text={"format": {"type": "json_object"}})).answer.kind == "json_object"


def test_json_is_demanded_of_the_model(http):
    """The model's own words are noise, and still are JSON of the schema."""
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    text = {"format": {"type": "json_schema", "name": "a", "schema": schema}}
    answer = http("POST", "/v1/responses", json=ASK | {"text": text, "reasoning": {"effort": "none"}, "seed": 1}).json()
    assert set(json.loads(answer["output"][0]["content"][0]["text"])) == {"ok"}


def test_a_request_survives_a_file():
    """What a record holds is the request again, with all its items."""
    items = [user("?"), {"type": "web_search_call"}, {"type": "reasoning", "summary": []},
             {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
             {"type": "function_call_output", "call_id": "c", "output": "3"}]  # fmt: skip
    wanted = {"type": "json_schema", "name": "a", "schema": SCHEMA}
    request = request_of(
        input=items, tools=[WEATHER, PATCH, {"type": "mcp"}], text={"format": wanted}, user="u", seed=3
    )
    written = json.dumps(request.model_dump(mode="json", by_alias=True, exclude_unset=True))
    again = ResponsesRequest.model_validate(json.loads(written))
    assert turn_of(again) == turn_of(request)
    assert custom_tools(again) == {"apply_patch"}
