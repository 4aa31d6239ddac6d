"""What Anthropic's clients may ask, and what the model reads of it."""

import asyncio
import json

import anthropic
import pytest

from dsv4.serve.messages_request import IGNORED, MessagesRequest, turn_of
from dsv4.serve.service import salt_of

QUESTION = "What is the weather in Berlin, " + "and again and again, " * 40 + "in Oslo?"
ASK = {"model": "toy", "max_tokens": 400, "messages": [{"role": "user", "content": QUESTION}]}
THINKS = {**ASK, "thinking": {"type": "enabled", "budget_tokens": 1024}}
WEATHER = {
    "name": "weather", "description": "Tell the weather.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
}  # fmt: skip


@pytest.fixture
def client(address):
    with anthropic.Anthropic(base_url=address, api_key="none", max_retries=0) as client:
        yield client


def post(http, given, path="/v1/messages", status=200, **headers):
    response = http("POST", path, json=given, headers=headers)
    assert response.status_code == status, response.text
    return response.json()


def refusal(http, given, **more):
    body = post(http, given, **{"status": 400, **more})
    assert body["type"] == "error"
    return body["error"]["type"], body["error"]["message"]


def prompt_of(http, asked, given):
    post(http, given)
    return asked[-1]["prompt"]


def history(content, *results):
    return [*ASK["messages"], {"role": "assistant", "content": content}, {"role": "user", "content": list(results)}]


def result(call_id, content, **more):
    return {"type": "tool_result", "tool_use_id": call_id, "content": content, **more}


def test_results_come_in_the_order_of_the_calls_and_before_the_text(http, says):
    asked = says("Fine.")
    used = [{"type": "tool_use", "id": f"toolu_{name}", "name": "weather", "input": {"city": name}} for name in "ab"]
    results = [{"type": "text", "text": "Now?"}, result("toolu_b", "rain", is_error=True), result("toolu_a", None)]
    prompt = prompt_of(http, asked, {**ASK, "tools": [WEATHER], "messages": history(used, *results)})
    assert "<tool_result></tool_result>\n\n<tool_result>Error: rain</tool_result>\n\nNow?<" in prompt
    assert 'name="city" string="true">a</' in prompt


def test_tools_are_shown_as_functions_and_those_of_hosted_servers_are_not(http, says):
    asked = says("Fine.")
    tools = [{"type": "web_search_20250305", "name": "web_search", "max_uses": 3}, {**WEATHER, "type": "custom",
             "cache_control": {"type": "ephemeral"}, "defer_loading": False}, {"type": "mcp_toolset"}]  # fmt: skip
    prompt = prompt_of(http, asked, {**ASK, "tools": tools})
    function = {"name": "weather", "description": "Tell the weather.", "parameters": WEATHER["input_schema"]}
    assert json.dumps(function) in prompt
    assert not [word for word in ("web_search", "ephemeral", "mcp") if word in prompt]
    assert json.dumps(function) not in prompt_of(http, asked, {**ASK, "tools": tools, "tool_choice": {"type": "none"}})
    assert "tools" in refusal(http, {**ASK, "tools": tools[:1], "tool_choice": {"type": "any"}})[1]


@pytest.mark.parametrize(
    ("choice", "kind", "name"),
    [
        (None, "auto", ""),
        ({"type": "auto"}, "auto", ""),
        ({"type": "any"}, "required", ""),
        ({"type": "none"}, "none", ""),
        ({"type": "tool", "name": "weather"}, "named", "weather"),
    ],
)
def test_every_choice_of_tools(choice, kind, name):
    turn = turn_of(MessagesRequest.model_validate({**ASK, "tools": [WEATHER], "tool_choice": choice}))
    assert (turn.tool_choice.kind, turn.tool_choice.name, turn.one_call) == (kind, name, False)


def test_a_choice_that_nothing_meets_is_refused(http):
    given = {**ASK, "tools": [WEATHER]}
    assert refusal(http, {**given, "tool_choice": {"type": "tool"}})[1] == "tool_choice.name: Field required"
    assert "'rain'" in refusal(http, {**given, "tool_choice": {"type": "tool", "name": "rain"}})[1]
    assert "twice" in refusal(http, {**given, "tools": [WEATHER, WEATHER]})[1]


def test_system_and_text_may_be_blocks(http, says):
    asked = says("Fine.")
    blocks = [
        {"type": "text", "text": "One.", "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": "Two."},
    ]
    given = {**ASK, "system": blocks, "messages": [{"role": "user", "content": blocks}]}
    same = {**ASK, "system": "One.\n\nTwo.", "messages": [{"role": "user", "content": "One.\n\nTwo."}]}
    assert prompt_of(http, asked, given) == prompt_of(http, asked, same)
    assert "sentence\uff5c>One.\n\nTwo.<\uff5cUser\uff5c>One.\n\nTwo.<\uff5cAssistant" in asked[0]["prompt"].replace(
        "\u2581", ""
    )


def test_what_changes_with_every_request_is_left_out_of_the_system_prompt(http, says):
    asked = says("Fine.")
    head = {"type": "text", "text": "x-anthropic-billing-header: cc_version=2; cch=12ab;"}
    given = {**ASK, "system": [head, {"type": "text", "text": "Be kind."}]}
    assert prompt_of(http, asked, given) == prompt_of(http, asked, {**ASK, "system": "Be kind."})


def test_what_cannot_be_read_leaves_a_mark(http, says):
    asked = says("Fine.")
    picture = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
    document = {
        "type": "document",
        "title": "Notes",
        "source": {"type": "text", "media_type": "text/plain", "data": "Abc"},
    }
    file = {"type": "document", "source": {"type": "url", "url": "https://example.org"}}
    found = {"type": "search_result", "source": "src", "title": "Ttl", "content": [{"type": "text", "text": "Def"}]}
    results = result("toolu_a", [picture, document, found])
    used = [{"type": "redacted_thinking", "data": "zzz"}, {"type": "server_tool_use", "id": "s", "name": "web"},
            {"type": "tool_use", "id": "toolu_a", "name": "weather", "input": {}}]  # fmt: skip
    prompt = prompt_of(http, asked, {**ASK, "messages": history(used, results, picture, file, document)})
    assert "[Unsupported image]\n\nNotes\n\nAbc\n\nTtl (src)\n\nDef</tool_result>" in prompt
    assert "</tool_result>\n\n[Unsupported image]\n\n[Unsupported document]\n\nNotes\n\nAbc<" in prompt
    assert "zzz" not in prompt
    assert "server_tool_use" not in prompt


def test_messages_of_the_assistant_that_follow_one_another_are_one(http, says):
    asked = says("Fine.")
    parts = [{"type": "thinking", "thinking": "Hm.", "signature": "?"}, {"type": "text", "text": "One."},
             {"type": "tool_use", "id": "toolu_a", "name": "weather", "input": {}}]  # fmt: skip
    given = {**THINKS, "tools": [WEATHER], "messages": history(parts, result("toolu_a", "sun"))}
    apart = [ASK["messages"][0], *({"role": "assistant", "content": [part]} for part in parts), given["messages"][-1]]
    assert prompt_of(http, asked, {**given, "messages": apart}) == prompt_of(http, asked, given)
    assert "<think>Hm.</think>One.\n\n<" in asked[0]["prompt"]


def test_system_messages_are_the_system_s_at_the_beginning_and_text_after_it(http, says):
    asked = says("Fine.")
    first, later = {"role": "system", "content": "Be kind."}, {"role": "system", "content": "Be brief."}
    given = {**ASK, "messages": [first, *ASK["messages"], later]}
    same = {**ASK, "system": "Be kind.", "messages": [{"role": "user", "content": QUESTION + "\n\nBe brief."}]}
    assert prompt_of(http, asked, given) == prompt_of(http, asked, same)
    assert "none of the user" in refusal(http, {**ASK, "messages": [first]})[1]


@pytest.mark.parametrize("given", [ASK, THINKS])
def test_the_last_message_of_the_assistant_is_gone_on_with(http, says, given):
    asked = says(" it is.")
    messages = [*ASK["messages"], {"role": "assistant", "content": "Yes,"}]
    answer = post(http, {**given, "messages": messages})
    assert asked[0]["prompt"].endswith("</think>Yes,")
    assert answer["content"] == [{"type": "text", "text": " it is."}]
    empty = [*ASK["messages"], {"role": "assistant", "content": []}]
    assert prompt_of(http, asked, {**given, "messages": empty}) == prompt_of(http, asked, given)


def test_a_call_that_is_demanded_after_a_beginning_does_not_wait_for_thinking(service):
    messages = [*ASK["messages"], {"role": "assistant", "content": "Yes."}]
    given = {**THINKS, "tools": [WEATHER], "tool_choice": {"type": "any"}}
    end_think = service.tokenizer.token_to_id("</think>")
    for said, waits in ((ASK["messages"], True), (messages, False)):
        turn = turn_of(MessagesRequest.model_validate({**given, "messages": said}))
        mask = asyncio.run(service.prepare(turn)).mask
        assert bool(mask([])[end_think]) is waits


def test_json_of_a_schema_is_what_comes(client, says, service):
    schema = {"type": "object", "properties": {"fine": {"enum": ["yes", "no"]}}, "required": ["fine"],
              "additionalProperties": False}  # fmt: skip
    wanted = {"format": {"type": "json_schema", "schema": schema}}
    answer = client.messages.create(**ASK, output_config=wanted)
    assert json.loads(answer.content[0].text)["fine"] in ("yes", "no")
    asked = says("{}")
    client.messages.create(**ASK, output_config=wanted)
    client.messages.create(**ASK, extra_body={"output_format": wanted["format"]})
    assert json.dumps(schema) in asked[0]["prompt"]
    assert asked[0]["prompt"] == asked[1]["prompt"]
    assert None not in (asked[0]["mask"], asked[1]["mask"])
    said = [*ASK["messages"], {"role": "assistant", "content": "{"}]
    with pytest.raises(anthropic.BadRequestError, match="cannot go on from"):
        client.messages.create(**{**ASK, "messages": said}, output_config=wanted)


def test_sampling_is_as_asked(http, says):
    asked = says("Fine.")
    post(http, {**ASK, "temperature": 1.5, "top_p": 0.5, "top_k": 7})
    sampling = asked[0]["sampling"]
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (1.5, 0.5, 7)
    assert refusal(http, {**ASK, "temperature": 2.5})[1].startswith("temperature: ")


def test_users_are_kept_apart(http, says):
    asked = says("Fine.")
    for metadata in (None, {}, {"user_id": None}, {"user_id": "one"}, {"user_id": "another"}):
        post(http, {**ASK, "metadata": metadata})
    assert [one["salt"] for one in asked] == [b"", b"", b"", salt_of("one"), salt_of("another")]


def test_names_of_models(http, says):
    says("Fine.")
    for name in ("toy", "claude-sonnet-5", "claude-3-5-haiku-latest", "deepseek-v4-pro"):
        assert post(http, {**ASK, "model": name})["model"] == name
    for path in ("/v1/messages", "/v1/messages/count_tokens"):
        given = {key: ASK[key] for key in ASK if "count" not in path or key != "max_tokens"}
        kind, message = refusal(http, {**given, "model": "gpt-9"}, path=path, status=404)
        assert kind == "not_found_error"
        assert "gpt-9" in message


@pytest.mark.parametrize("prefix", ["/v1", "/anthropic/v1", "/anthropic"])
def test_every_path(http, says, prefix):
    says("Fine.")
    assert post(http, ASK, path=f"{prefix}/messages")["content"][0]["text"] == "Fine."
    given = {key: ASK[key] for key in ("model", "messages")}
    assert set(post(http, given, path=f"{prefix}/messages/count_tokens")) == {"input_tokens"}
    assert refusal(http, {**ASK, "foo": 1}, path=f"{prefix}/messages")[0] == "invalid_request_error"


def test_fields_of_hosted_services_are_ignored_and_unknown_ones_refused(http, says):
    says("Fine.")
    post(http, {**ASK, **{name: {"any": 1} for name in IGNORED}})
    assert refusal(http, {**ASK, "foo": 1}) == ("invalid_request_error", "foo: Extra inputs are not permitted")
    given = {key: ASK[key] for key in ASK if key != "max_tokens"}
    assert refusal(http, given) == ("invalid_request_error", "max_tokens: Field required")


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        ([], "messages: "),
        ([{"role": "tool", "content": "x"}], "messages.0.role: "),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages.0.content.0.text.text: Field required"),
        ([{"role": "user", "content": [{"type": "tool_result"}]}], "messages.0.content.0.tool_result.tool_use_id: "),
        ([{"role": "user", "content": []}], "messages.0: user messages must have non-empty content"),
        ([{"role": "user", "content": None}], "messages.0.content: "),
        ([{"role": "user", "content": [7]}], "messages.0.content.0.other: "),
        (history([result("a", "x")], {"type": "text", "text": "y"}), "messages.1: a tool_result is the assistant's"),
        ([{"role": "user", "content": [{"type": "tool_use", "id": "a", "name": "b", "input": {}}]}], "messages.0: "),
        (history([{"type": "tool_use", "id": "a", "name": "b", "input": {}}])[:2], "messages.1: a tool_use is the end"),
    ],
)
def test_wrong_messages_are_told_by_their_place(http, messages, told):
    kind, message = refusal(http, {**ASK, "messages": messages})
    assert kind == "invalid_request_error"
    assert message.startswith(told), message


# ---- counting ----


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"system": "Be kind."},
        {"thinking": {"type": "adaptive"}, "output_config": {"effort": "max"}},
        {"tools": [WEATHER]},
        {"tools": [WEATHER], "tool_choice": {"type": "none"}},
        {"output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}}},
    ],
)
def test_tokens_are_counted_as_they_are_used(client, says, given):
    says("{}")
    asked = {key: ASK[key] for key in ("model", "messages")} | given
    counted = client.messages.count_tokens(**asked).input_tokens
    usage = client.messages.create(max_tokens=9, **asked).usage
    assert counted == usage.input_tokens + usage.cache_read_input_tokens > 128


def test_tokens_are_counted_beyond_the_context(client, service):
    asked = {"model": "toy", "messages": [{"role": "user", "content": "weather " * 4000}]}
    counted = client.messages.count_tokens(**asked).input_tokens
    assert counted > service.max_context
    with pytest.raises(anthropic.BadRequestError) as refused:
        client.messages.create(max_tokens=9, **asked)
    error = refused.value.body["error"]
    assert error["type"] == "invalid_request_error"
    assert error["message"].startswith(f"prompt is too long: {counted} tokens > 2048 maximum")
    with pytest.raises(anthropic.BadRequestError), client.messages.stream(max_tokens=9, **asked):
        pass
    with pytest.raises(anthropic.BadRequestError, match="max_tokens: Extra inputs"):
        client.messages.count_tokens(**asked, extra_body={"max_tokens": 9})
