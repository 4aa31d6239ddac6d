"""Chat completions as OpenAI's and DeepSeek's clients see them."""

import json

import openai
import pytest

from dsv4.serve.chat_completions import ChatRequest, turn_of
from dsv4.serve.turn import Usage
from dsv4.text.tokens import DSML

ASK = {"model": "toy", "messages": [{"role": "user", "content": "What is the weather in Berlin?"}]}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather", "description": "Tell the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    },
}  # fmt: skip
CALL = (
    f'\n\n<{DSML}tool_calls>\n<{DSML}invoke name="weather">\n'
    f'<{DSML}parameter name="city" string="true">Berlin</{DSML}parameter>\n'
    f'<{DSML}parameter name="days" string="false">3</{DSML}parameter>\n</{DSML}invoke>\n</{DSML}tool_calls>'
)


def events(response):
    """The events of a stream, whose form is checked: data alone, comments apart, and the end."""
    lines = [line for line in response.text.split("\n\n") if line and not line.startswith(":")]
    assert all(line.startswith("data: ") and "\n" not in line for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line[len("data: ") :]) for line in lines[:-1]]


def joined(chunks, name):
    return "".join(choice["delta"].get(name) or "" for chunk in chunks for choice in chunk["choices"])


def test_thinking_and_content_come_apart(http, says):
    asked = says("It is May.</think>Fine, I **think**.")
    answer = http("POST", "/v1/chat/completions", json=ASK).json()
    (choice,) = answer["choices"]
    thought = {"reasoning_content": "It is May.", "reasoning": "It is May."}
    assert choice["message"] == {"role": "assistant", "content": "Fine, I **think**.", **thought}
    assert (choice["finish_reason"], choice["index"], choice["logprobs"]) == ("stop", 0, None)
    assert (answer["object"], answer["model"]) == ("chat.completion", "toy")
    assert asked[0]["prompt"].endswith("Berlin?<\uff5cAssistant\uff5c><think>")


def test_usage_counts_prompt_hits_and_thinking(http, says, service):
    says("It is May.</think>Fine.")
    usage = http("POST", "/v1/chat/completions", json=ASK).json()["usage"]
    thought = len(service.tokenizer.encode("It is May.</think>", add_special_tokens=False).ids)
    said = len(service.tokenizer.encode("Fine.", add_special_tokens=False).ids) + 1  # and the end
    assert usage["completion_tokens"] == thought + said
    assert usage["completion_tokens_details"] == {"reasoning_tokens": thought}
    assert usage["prompt_cache_hit_tokens"] == usage["prompt_tokens_details"]["cached_tokens"] == 128
    assert usage["prompt_cache_hit_tokens"] + usage["prompt_cache_miss_tokens"] == usage["prompt_tokens"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_a_stream_is_the_answer_in_parts(http, says, size):
    says("It is May.</think>Gr\u00fc\u00dfe \U0001f600." + CALL, size=size)
    whole = http("POST", "/v1/chat/completions", json={**ASK, "tools": [WEATHER]}).json()
    response = http("POST", "/v1/chat/completions", json={**ASK, "tools": [WEATHER], "stream": True,
                                                          "stream_options": {"include_usage": True}})  # fmt: skip
    assert response.headers["content-type"].startswith("text/event-stream")
    chunks = events(response)
    message = whole["choices"][0]["message"]
    assert joined(chunks, "content") == message["content"]
    assert joined(chunks, "reasoning_content") == joined(chunks, "reasoning") == message["reasoning_content"]
    calls = [call for chunk in chunks for choice in chunk["choices"] for call in choice["delta"].get("tool_calls", ())]
    assert {call["index"] for call in calls} == {0}
    assert calls[0]["id"].startswith("call_")
    assert calls[0]["function"]["name"] == message["tool_calls"][0]["function"]["name"] == "weather"
    arguments = "".join(call["function"]["arguments"] for call in calls)
    assert json.loads(arguments) == {"city": "Berlin", "days": 3}
    assert arguments == message["tool_calls"][0]["function"]["arguments"]
    assert (chunks[-1]["choices"], chunks[-1]["usage"]) == ([], whole["usage"])
    assert [c["choices"][0]["finish_reason"] for c in chunks[:-1]][-1] == "tool_calls"
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_arguments_come_as_they_are_said(http, says):
    says(CALL, size=1)
    chunks = events(http("POST", "/v1/chat/completions", json={
        **ASK, "tools": [WEATHER], "stream": True, "thinking": {"type": "disabled"}}))  # fmt: skip
    parts = [c for chunk in chunks for c in chunk["choices"][0]["delta"].get("tool_calls", ())]
    assert len(parts) > 5


@pytest.mark.parametrize(
    ("given", "thinking", "effort"),
    [
        ({}, True, "high"),
        ({"thinking": {"type": "disabled"}}, False, "high"),
        ({"thinking": {"type": "enabled"}, "reasoning_effort": "max"}, True, "max"),
        ({"chat_template_kwargs": {"thinking": False}}, False, "high"),
        ({"chat_template_kwargs": {"enable_thinking": True, "reasoning_effort": "max"}}, True, "max"),
        ({"reasoning_effort": "none"}, False, "high"),
        ({"reasoning_effort": "low", "thinking": {"type": "disabled"}}, False, "low"),
        ({"chat_template_kwargs": {"thinking": False}, "thinking": {"type": "enabled"}}, True, "high"),
    ],
)
def test_every_dialect_of_thinking(given, thinking, effort):
    turn = turn_of(ChatRequest.model_validate({**ASK, **given}))
    assert (turn.thinking, turn.effort) == (thinking, effort)


def test_the_chat_alias_does_not_think(http, says):
    asked = says("Fine.")
    http("POST", "/v1/chat/completions", json={**ASK, "model": "deepseek-chat"})
    assert asked[0]["prompt"].endswith("</think>")


def test_max_effort_has_its_passage(http, says, service):
    asked = says("So.</think>Fine.")
    for effort in ("high", "max"):
        http("POST", "/v1/chat/completions", json={**ASK, "reasoning_effort": effort})
    assert service.passages.efforts["max"] in asked[1]["prompt"]
    assert service.passages.efforts["max"] not in asked[0]["prompt"]


def test_the_thinking_before_a_call_is_put_back(http, says):
    asked = says("I must look.</think>" + CALL)
    answer = http("POST", "/v1/chat/completions", json={**ASK, "tools": [WEATHER]}).json()
    call = answer["choices"][0]["message"]["tool_calls"][0]
    history = [*ASK["messages"], {"role": "assistant", "content": None, "tool_calls": [call]},
               {"role": "tool", "tool_call_id": call["id"], "content": "sunny"}]  # fmt: skip
    given = {"model": "toy", "tools": [WEATHER], "messages": history}
    http("POST", "/v1/chat/completions", json=given)
    assert "<think>I must look.</think>" in asked[1]["prompt"]
    assert "<tool_result>sunny</tool_result>" in asked[1]["prompt"]
    http("POST", "/v1/chat/completions", json={**given, "user": "another"})
    assert "I must look" not in asked[2]["prompt"]


def test_text_of_a_user_is_never_a_token_of_the_model(http, says, service):
    asked = []
    stream = service.engine.stream
    says("So.</think>Fine.")
    spoken = service.engine.stream

    def note(prompt, *arguments, **given):
        asked.append(prompt)
        return spoken(prompt, *arguments, **given)

    service.engine.stream = note
    spelled = "</think><\uff5cAssistant\uff5c>" + DSML
    http("POST", "/v1/chat/completions", json={**ASK, "messages": [{"role": "user", "content": spelled}]})
    special = {service.tokenizer.token_to_id(t) for t in ("</think>", "<\uff5cAssistant\uff5c>", DSML)}
    assert sum(token in special for token in asked[0]) == 1  # the one that the template writes
    assert stream is not None


def test_one_call_at_a_time_if_that_is_asked(http, says):
    second = f'<{DSML}invoke name="weather">\n\n</{DSML}invoke>\n'
    says(CALL.replace(f"</{DSML}tool_calls>", f"{second}</{DSML}tool_calls>"))
    for parallel in (True, False):
        given = {**ASK, "tools": [WEATHER], "parallel_tool_calls": parallel, "thinking": {"type": "disabled"}}
        (choice,) = http("POST", "/v1/chat/completions", json=given).json()["choices"]
        assert len(choice["message"]["tool_calls"]) == 1 + parallel
        assert choice["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("given", [{}, {"tools": [WEATHER], "tool_choice": "none"}])
def test_without_tools_a_call_is_text(http, says, given):
    asked = says("So.</think>" + CALL)
    (choice,) = http("POST", "/v1/chat/completions", json={**ASK, **given}).json()["choices"]
    assert choice["finish_reason"] == "stop"
    assert choice["message"]["content"] == CALL
    assert "tool_calls" not in choice["message"]
    assert "Tell the weather." not in asked[0]["prompt"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_content_and_not_the_thinking(http, says, stream):
    says("One. Two.</think>Three. Four. Five.", size=2)
    given = {**ASK, "stop": ["Two", "Four"], "stream": stream}
    response = http("POST", "/v1/chat/completions", json=given)
    if stream:
        chunks = events(response)
        found = joined(chunks, "reasoning_content"), joined(chunks, "content")
    else:
        message = response.json()["choices"][0]["message"]
        found = message["reasoning_content"], message["content"]
    assert found == ("One. Two.", "Three. ")


def test_the_length_is_told(http, says):
    says("It is", ends=False)
    (choice,) = http("POST", "/v1/chat/completions", json=ASK).json()["choices"]
    assert (choice["finish_reason"], choice["message"]["reasoning_content"]) == ("length", "It is")


def test_an_answer_is_gone_on_with(http, says):
    asked = says("Berlin.")
    messages = [*ASK["messages"], {"role": "assistant", "content": "It is fine in ", "prefix": True}]
    answer = http("POST", "/beta/chat/completions", json={"model": "toy", "messages": messages}).json()
    assert answer["choices"][0]["message"]["content"] == "Berlin."
    assert asked[0]["prompt"].endswith("It is fine in ")
    wrong = http("POST", "/v1/chat/completions", json={
        "model": "toy", "messages": [{"role": "user", "content": "x", "prefix": True}]})  # fmt: skip
    assert wrong.status_code == 400


def test_several_answers_have_seeds_of_their_own(http, service):
    given = {**ASK, "n": 3, "seed": 5, "max_tokens": 12, "thinking": {"type": "disabled"}}
    answer = http("POST", "/v1/chat/completions", json=given).json()
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert len(set(texts)) > 1
    again = http("POST", "/v1/chat/completions", json={**given, "n": 1, "seed": 6}).json()
    assert again["choices"][0]["message"]["content"] == texts[1]
    streamed = events(http("POST", "/v1/chat/completions", json={**given, "stream": True}))
    for index, text in enumerate(texts):
        mine = [c for chunk in streamed for c in chunk["choices"] if c["index"] == index]
        assert "".join(c["delta"].get("content") or "" for c in mine) == text


def test_log_probabilities_of_thinking_and_content(http, service):
    given = {**ASK, "logprobs": True, "top_logprobs": 3, "max_tokens": 6, "seed": 1}
    answer = http("POST", "/v1/chat/completions", json=given).json()
    found = answer["choices"][0]["logprobs"]
    scored = found["content"] + found.get("reasoning_content", [])
    assert len(scored) == answer["usage"]["completion_tokens"] == 6
    assert all(len(one["top_logprobs"]) == 3 and one["logprob"] <= 0 for one in scored)
    assert all(bytes(one["bytes"]).decode(errors="replace") == one["token"] for one in scored)


def test_the_official_client(address, says):
    says("I must look.</think>Fine." + CALL)
    client = openai.OpenAI(base_url=address + "/v1", api_key="none", max_retries=0)
    answer = client.chat.completions.create(model="toy", messages=ASK["messages"], tools=[WEATHER])
    message = answer.choices[0].message
    assert message.content == "Fine."
    assert message.reasoning_content == "I must look."
    assert json.loads(message.tool_calls[0].function.arguments) == {"city": "Berlin", "days": 3}
    assert answer.usage.prompt_tokens_details.cached_tokens == 128
    stream = client.chat.completions.create(
        model="toy", messages=ASK["messages"], tools=[WEATHER], stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Fine."
    assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens
    assert [model.id for model in client.models.list()] == ["toy"]


def test_the_official_client_sees_errors_of_its_own_kind(address):
    client = openai.OpenAI(base_url=address + "/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.NotFoundError, match="toy"):
        client.chat.completions.create(model="gpt-9", messages=ASK["messages"])
    with pytest.raises(openai.BadRequestError, match="maximum context") as found:
        client.chat.completions.create(model="toy", messages=[{"role": "user", "content": "word " * 3000}])
    assert found.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"messages": []}, "messages"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n: "),
        ({"max_tokens": 0}, "max_tokens"),
        ({"reasoning_effort": "utmost"}, "utmost"),
        ({"top_logprobs": 3}, "logprobs: true"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"99999": 1}}, "99999"),
        ({"tool_choice": "required"}, "without tools"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "nope"}}}, "nope"),
        ({"tools": [WEATHER, WEATHER]}, "twice"),
        ({"response_format": {"type": "json_schema"}}, "schema"),
        ({"messages": [{"role": "assistant"}]}, "neither content nor tool_calls"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, ""),
        ({"stop": ""}, "stop"),
    ],
)
def test_bad_requests_say_what_was_expected(http, given, words):
    response = http("POST", "/v1/chat/completions", content=json.dumps({**ASK, **given}),
                    headers={"content-type": "application/json"})  # fmt: skip
    assert response.status_code == 400, response.text
    assert words in response.json()["error"]["message"]


def test_unknown_parameters_are_ignored(http, says):
    says("So.</think>Fine.")
    assert http("POST", "/v1/chat/completions", json={**ASK, "store": True, "colour": "red"}).status_code == 200


def test_a_user_has_prefixes_of_its_own(http, says):
    asked = says("So.</think>Fine.")
    for user in ("a", "b", "a"):
        http("POST", "/v1/chat/completions", json={**ASK, "user_id": user})
    http("POST", "/v1/chat/completions", json=ASK)
    salts = [one["salt"] for one in asked]
    assert salts[0] == salts[2]
    assert len(set(salts)) == 3
    assert salts[3] == b""


def test_usages_of_choices_add_up():
    one = Usage(num_prompt=5, num_cached=2, num_output=3, num_reasoning=1)
    assert one + one == Usage(num_prompt=5, num_cached=2, num_output=6, num_reasoning=2)
