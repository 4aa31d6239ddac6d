"""The Responses protocol as OpenAI's client and Codex see it."""

import json

import openai
import pytest

from dsv4.text.tokens import DSML

ASK = {"model": "toy", "input": "What is the weather in Berlin?"}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
WEATHER = {"type": "function", "name": "weather", "description": "Tell it.", "parameters": SCHEMA, "strict": False}
PATCH = {
    "type": "custom", "name": "apply_patch", "description": "Change files.",
    "format": {"type": "grammar", "syntax": "lark", "definition": "start: /.+/"},
}  # fmt: skip


def invoke(name, **texts):
    lines = [f'<{DSML}parameter name="{key}" string="true">{text}</{DSML}parameter>' for key, text in texts.items()]
    return "\n".join([f'<{DSML}invoke name="{name}">', *lines, f"</{DSML}invoke>"])


def block(*calls):
    return "\n\n" + "\n".join([f"<{DSML}tool_calls>", *calls, f"</{DSML}tool_calls>"])


def events(response):
    """The events of a stream, whose form is checked: names as in the data, numbers from 0 on, one end."""
    found = []
    for part in response.text.split("\n\n"):
        if part and not part.startswith(":"):
            name, data = part.split("\n")
            found.append(json.loads(data.removeprefix("data: ")))
            assert name == f"event: {found[-1]['type']}"
    assert [one["sequence_number"] for one in found] == list(range(len(found)))
    ends = ("response.completed", "response.incomplete", "response.failed")
    assert [one["type"] in ends for one in found] == [False] * (len(found) - 1) + [True]
    return found


def kinds(found):
    """The types of events without their first word, those in a row once."""
    names = [one["type"].removeprefix("response.") for one in found]
    return [name for i, name in enumerate(names) if i == 0 or name != names[i - 1]]


def user(text):
    return {"role": "user", "content": text}


def test_a_whole_answer(http, says, service):
    asked = says("It is May.</think>Fine, I think.")
    answer = http("POST", "/v1/responses", json=ASK | {"instructions": "Be brief.", "metadata": {"a": "b"}}).json()
    thought, said = answer["output"]
    assert thought == {
        "id": thought["id"], "type": "reasoning", "status": "completed", "summary": [],
        "content": [{"type": "reasoning_text", "text": "It is May."}],
    }  # fmt: skip
    assert said == {
        "id": said["id"], "type": "message", "status": "completed", "role": "assistant",
        "content": [{"type": "output_text", "text": "Fine, I think.", "annotations": [], "logprobs": []}],
    }  # fmt: skip
    assert [len(item["id"].split("_")[1]) for item in (answer, thought, said)] == [24] * 3
    assert [item["id"].split("_")[0] for item in (answer, thought, said)] == ["resp", "rs", "msg"]
    assert (answer["object"], answer["status"], answer["model"]) == ("response", "completed", "toy")
    assert (answer["error"], answer["incomplete_details"], answer["metadata"]) == (None, None, {"a": "b"})
    num_thought = len(service.tokenizer.encode("It is May.</think>", add_special_tokens=False).ids)
    num_said = len(service.tokenizer.encode("Fine, I think.", add_special_tokens=False).ids) + 1
    usage = answer["usage"]
    assert usage["output_tokens"] == num_thought + num_said
    assert usage["output_tokens_details"] == {"reasoning_tokens": num_thought}
    assert usage["input_tokens_details"]["cached_tokens"] == 128
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert "Be brief.<\uff5cUser\uff5c>What is" in asked[0]["prompt"]


def test_the_order_of_events(http, says):
    says("Well.</think>I call." + block(invoke("weather", city="Oslo"), invoke("apply_patch", input='a "b"\nc')))
    response = http("POST", "/v1/responses", json=ASK | {"stream": True, "tools": [WEATHER, PATCH]})
    assert response.headers["content-type"].startswith("text/event-stream")
    found = events(response)
    text = ["output_item.added", "content_part.added"], ["content_part.done", "output_item.done"]
    assert kinds(found) == [
        "created", "in_progress",
        *text[0], "reasoning_text.delta", "reasoning_text.done", *text[1],
        *text[0], "output_text.delta", "output_text.done", *text[1],
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done",
        "output_item.added", "custom_tool_call_input.delta", "custom_tool_call_input.done", "output_item.done",
        "completed",
    ]  # fmt: skip
    output = found[-1]["response"]["output"]
    assert [item["type"] for item in output] == ["reasoning", "message", "function_call", "custom_tool_call"]
    assert output == [one["item"] for one in found if one["type"] == "response.output_item.done"]
    assert json.loads(output[2]["arguments"]) == {"city": "Oslo"}
    assert (output[2]["name"], output[3]["name"], output[3]["input"]) == ("weather", "apply_patch", 'a "b"\nc')
    assert [item["id"].split("_")[0] for item in output] == ["rs", "msg", "fc", "ctc"]
    assert all(item["call_id"].startswith("call_") for item in output[2:])
    for index, item in enumerate(output):
        deltas = [one for one in found if one["type"].endswith(".delta") and one["output_index"] == index]
        whole = item["content"][0]["text"] if "content" in item else item.get("arguments") or item["input"]
        assert "".join(one["delta"] for one in deltas) == whole
        assert {one["item_id"] for one in deltas} == {item["id"]}
        assert len(deltas) > 1
    begun = found[0]["response"]
    assert (begun["tool_choice"], begun["tools"]) == ("auto", [WEATHER, PATCH])
    assert (begun["status"], begun["output"], begun["usage"]) == ("in_progress", [], None)
    assert {one["response"]["id"] for one in found if "response" in one} == {begun["id"]}


def test_an_answer_that_is_cut_is_incomplete(http, says):
    says("Well.</think>I c", ends=False)
    found = events(http("POST", "/v1/responses", json=ASK | {"stream": True}))
    last = found[-1]
    assert last["type"] == "response.incomplete"
    assert last["response"]["incomplete_details"] == {"reason": "max_output_tokens"}
    assert [item["status"] for item in last["response"]["output"]] == ["completed", "incomplete"]
    assert [one["item"]["status"] for one in found if "output_item.done" in one["type"]] == ["completed", "incomplete"]
    whole = http("POST", "/v1/responses", json=ASK).json()
    assert (whole["status"], whole["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert [item["status"] for item in whole["output"]] == ["completed", "incomplete"]


@pytest.mark.parametrize("tool", [WEATHER, PATCH], ids=["function", "custom"])
def test_a_call_that_is_cut_is_never_done(http, says, tool):
    whole = block(invoke(tool["name"], **{"input" if tool is PATCH else "city": "Oslo and more"}))
    says("</think>" + whole[: whole.index(" and more")], ends=False)
    found = events(http("POST", "/v1/responses", json=ASK | {"stream": True, "tools": [tool]}))
    assert "response.output_item.done" not in [one["type"] for one in found]
    (item,) = found[-1]["response"]["output"]
    assert (found[-1]["type"], item["status"]) == ("response.incomplete", "incomplete")
    assert "Oslo" in item["input" if tool is PATCH else "arguments"]


def test_a_failure_after_the_first_event(http, service, monkeypatch):
    async def stream(prompt, sampling=None, **_):
        raise ValueError("pages are out")
        yield

    monkeypatch.setattr(service.engine, "stream", stream)
    last = events(http("POST", "/v1/responses", json=ASK | {"stream": True}))[-1]
    assert last["type"] == "response.failed"
    assert (last["response"]["status"], last["response"]["output"]) == ("failed", [])
    assert last["response"]["error"] == {"code": "invalid_prompt", "message": "pages are out"}
    answer = http("POST", "/v1/responses", json=ASK)
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, "pages are out")


def test_the_official_client(address, says):
    says("It is May.</think>Fine." + block(invoke("weather", city="Oslo")))
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none") as client:
        answer = client.responses.create(**ASK, tools=[WEATHER], reasoning={"effort": "high"})
        assert answer.output_text == "Fine."
        assert [item.type for item in answer.output] == ["reasoning", "message", "function_call"]
        assert answer.output[0].content[0].text == "It is May."
        assert answer.usage.input_tokens_details.cached_tokens == 128
        with client.responses.stream(**ASK, tools=[WEATHER]) as stream:
            types = [one.type for one in stream]
            final = stream.get_final_response()
        assert types.count("response.output_text.delta") > 1
        assert types.count("response.reasoning_text.delta") > 1
        assert final.output_text == "Fine."
        assert json.loads(final.output[2].arguments) == {"city": "Oslo"}
        with pytest.raises(openai.BadRequestError, match="previous_response_id is given, but no conv"):
            client.responses.create(**ASK, previous_response_id="resp_1")
        with pytest.raises(openai.NotFoundError, match="there is no response"):
            client.responses.retrieve(answer.id)


def test_a_conversation_goes_back_and_forth(address, says):
    """All that the client got goes back as it came: the next prompt has the thinking, the call and its output."""
    asked = says("It is May.</think>" + block(invoke("weather", city="Oslo")), "Cold.</think>It is cold.")
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none") as client:
        items = [user("And in Oslo?")]
        first = client.responses.create(model="toy", input=items, tools=[WEATHER])
        call = first.output[-1]
        items += [item.model_dump(exclude_none=True) for item in first.output]
        items.append({"type": "function_call_output", "call_id": call.call_id, "output": "3 degrees"})
        second = client.responses.create(model="toy", input=items, tools=[WEATHER])
    assert second.output_text == "It is cold."
    assert asked[1]["prompt"].startswith(
        asked[0]["prompt"] + "It is May.</think>" + block(invoke("weather", city="Oslo"))
    )
    assert asked[1]["prompt"].endswith("<tool_result>3 degrees</tool_result><\uff5cAssistant\uff5c><think>")


def test_lost_thinking_is_put_back(http, says):
    asked = says("It is May.</think>" + block(invoke("weather", city="Oslo")), "</think>Cold.")
    call = http("POST", "/v1/responses", json=ASK | {"tools": [WEATHER]}).json()["output"][-1]
    items = [user("?"), call, {"type": "function_call_output", "call_id": call["call_id"], "output": "3"}]
    http("POST", "/v1/responses", json=ASK | {"tools": [WEATHER], "input": items})
    assert "It is May.</think>" in asked[1]["prompt"]


def test_what_codex_sends(http, says):
    """Its twelve fields, with tools and items of kinds that are not here."""
    asked = says("</think>" + block(invoke("apply_patch", input="*** Begin")))
    tools = [
        WEATHER, PATCH, {"type": "web_search", "external_web_access": False}, {"type": "local_shell"},
        {"type": "namespace", "name": "mcp__a", "description": "More.", "tools": [WEATHER]},
    ]  # fmt: skip
    items = [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Use the sandbox."}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "<environment>"}]},
        {"type": "web_search_call", "status": "completed", "action": {"type": "search", "query": "x"}},
        {"type": "reasoning", "summary": [], "content": None, "encrypted_content": "AAAA"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Do it."}]},
    ]
    body = {
        "model": "toy", "instructions": "You are Codex.", "input": items, "tools": tools, "tool_choice": "auto",
        "parallel_tool_calls": False, "reasoning": {"effort": "medium", "summary": "auto"}, "store": False,
        "stream": True, "include": ["reasoning.encrypted_content"], "prompt_cache_key": "0199",
        "client_metadata": {"x-codex-installation-id": "1"},
    }  # fmt: skip
    found = events(http("POST", "/v1/responses", json=body))
    (item,) = found[-1]["response"]["output"]
    assert (item["type"], item["input"]) == ("custom_tool_call", "*** Begin")
    prompt = asked[0]["prompt"]
    assert "You are Codex.\n\nUse the sandbox.\n\n## Tools" in prompt
    assert "<environment>\n\nDo it.<\uff5cAssistant\uff5c><think>" in prompt
    assert "web_search" not in prompt
    assert "namespace" not in prompt
    assert prompt.count('"name": "weather"') == 1
    assert "grammar:\\nstart: /.+/" in prompt
    assert asked[0]["salt"] == b""
