"""Messages as Anthropic's clients see them."""

import json
import re
from contextlib import ExitStack

import anthropic
import pytest

from dsv4.config.serve import ServeOptions
from dsv4.engine.outputs import Piece
from dsv4.serve.messages import Blocks, signature_of
from dsv4.serve.turn import CallBegun
from dsv4.text.events import CallEnd
from dsv4.text.tokens import DSML

QUESTION = "What is the weather in Berlin, " + "and again and again, " * 40 + "in Oslo?"
ASK = {"model": "toy", "max_tokens": 400, "messages": [{"role": "user", "content": QUESTION}]}
THINKS = {**ASK, "thinking": {"type": "enabled", "budget_tokens": 1024}}
WEATHER = {
    "name": "weather", "description": "Tell the weather.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
}  # fmt: skip


def invoke(city, days):
    return (
        f'<{DSML}invoke name="weather">\n<{DSML}parameter name="city" string="true">{city}</{DSML}parameter>\n'
        f'<{DSML}parameter name="days" string="false">{days}</{DSML}parameter>\n</{DSML}invoke>\n'
    )


def calls(*texts):
    return f"\n\n<{DSML}tool_calls>\n{''.join(texts)}</{DSML}tool_calls>"


CALL = calls(invoke("Berlin", 3))


@pytest.fixture
def options():
    return ServeOptions()


@pytest.fixture
def service(make_service, options):
    service = make_service(options)
    yield service
    service.engine.close()


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


def events(response):
    """The events of a stream, whose form is checked: a name that is the type of the data."""
    found = []
    for part in response.text.split("\n\n")[:-1]:
        name, data = part.split("\n")
        assert (name[:7], data[:6]) == ("event: ", "data: ")
        found.append(json.loads(data[len("data: ") :]))
        assert found[-1]["type"] == name[len("event: ") :]
    assert response.text.endswith("\n\n")
    return found


def streamed(http, given):
    response = http("POST", "/v1/messages", json={**given, "stream": True})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    return events(response)


def prompt_of(http, asked, given):
    post(http, given)
    return asked[-1]["prompt"]


# ---- answers ----


def test_an_answer_is_text_without_thinking(http, says, service):
    asked = says("Fine, I **think**.")
    answer = post(http, ASK)
    num_output = len(service.tokenizer.encode("Fine, I **think**.", add_special_tokens=False).ids) + 1  # and the end
    num_prompt = len(service.tokenizer.encode(asked[0]["prompt"], add_special_tokens=False).ids)
    assert answer.pop("id").startswith("msg_")
    assert answer == {
        "type": "message", "role": "assistant", "model": "toy", "stop_reason": "end_turn", "stop_sequence": None,
        "content": [{"type": "text", "text": "Fine, I **think**."}],
        "usage": {
            "input_tokens": num_prompt - 128, "cache_read_input_tokens": 128, "cache_creation_input_tokens": 0,
            "output_tokens": num_output, "output_tokens_details": {"thinking_tokens": 0},
        },
    }  # fmt: skip
    assert asked[0]["prompt"].endswith("Oslo?<\uff5cAssistant\uff5c></think>")
    assert asked[0]["sampling"].max_tokens == 400


@pytest.mark.parametrize("kind", ["enabled", "adaptive", "auto", "between_tools"])
def test_thinking_is_a_block_of_its_own(http, says, service, kind):
    asked = says("It is May.</think>Fine.")
    answer = post(http, {**ASK, "thinking": {"type": kind}})
    thinking = {"type": "thinking", "thinking": "It is May.", "signature": signature_of("It is May.")}
    assert answer["content"] == [thinking, {"type": "text", "text": "Fine."}]
    num_thinking = len(service.tokenizer.encode("It is May.</think>", add_special_tokens=False).ids)
    assert answer["usage"]["output_tokens_details"]["thinking_tokens"] == num_thinking
    assert asked[0]["prompt"].endswith("<think>")


def test_signatures_are_of_the_thinking():
    assert signature_of("a") == signature_of("a") != signature_of("b")
    assert len(signature_of("\ud800")) == 44


@pytest.mark.parametrize("given", [{}, {"thinking": {"type": "disabled"}}, {"thinking": None}])
@pytest.mark.parametrize("model", ["toy", "deepseek-reasoner", "claude-opus-4-8"])
def test_who_does_not_ask_for_thinking_gets_none(http, says, given, model):
    asked = says("Fine.")
    answer = post(http, {**ASK, "model": model, **given})
    assert answer["model"] == model
    assert [block["type"] for block in answer["content"]] == ["text"]
    assert asked[0]["prompt"].endswith("</think>")


def test_effort_is_for_those_who_think(http, says, service):
    asked = says("So.</think>Fine.")
    for effort in ("low", "xhigh", "max"):
        post(http, {**THINKS, "output_config": {"effort": effort}})
    assert [service.passages.efforts["max"] in one["prompt"] for one in asked] == [False, False, True]
    assert "effort is 'huge'" in refusal(http, {**THINKS, "output_config": {"effort": "huge"}})[1]


def test_thoughts_can_be_kept_from_the_client(http, says):
    says("It is May.</think>Fine.")
    given = {**ASK, "thinking": {"type": "adaptive", "display": "omitted"}}
    found = post(http, given)["content"]
    assert found[0] == {"type": "thinking", "thinking": "", "signature": signature_of("It is May.")}
    deltas = [one["delta"]["type"] for one in streamed(http, given) if one["type"] == "content_block_delta"]
    assert (deltas[0], set(deltas[1:])) == ("signature_delta", {"text_delta"})


def test_a_stream_has_all_events_in_order(http, says):
    says("It is.</think>Fine." + CALL, size=1000)
    found = streamed(http, {**THINKS, "tools": [WEATHER]})
    start, ping, *blocks, delta, stop = found
    usage = start["message"].pop("usage")
    assert start["message"].pop("id").startswith("msg_")
    assert start["message"] == {
        "type": "message", "role": "assistant", "model": "toy", "content": [], "stop_reason": None,
        "stop_sequence": None,
    }  # fmt: skip
    assert (usage["output_tokens"], usage["cache_read_input_tokens"]) == (0, 0)
    assert usage["input_tokens"] == delta["usage"]["input_tokens"] + delta["usage"]["cache_read_input_tokens"]
    assert (ping, stop) == ({"type": "ping"}, {"type": "message_stop"})
    assert delta["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    call_id = blocks[7]["content_block"].pop("id")
    assert call_id.startswith("toolu_")
    assert len(call_id) == 30
    whole = [one for one in blocks if one["type"] != "content_block_delta" or one["index"] < 2]
    assert whole == [
        {"type": "content_block_start", "index": 0,
         "content_block": {"type": "thinking", "thinking": "", "signature": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "thinking_delta", "thinking": "It is."}},
        {"type": "content_block_delta", "index": 0,
         "delta": {"type": "signature_delta", "signature": signature_of("It is.")}},
        {"type": "content_block_stop", "index": 0},
        {"type": "content_block_start", "index": 1, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 1, "delta": {"type": "text_delta", "text": "Fine."}},
        {"type": "content_block_stop", "index": 1},
        {"type": "content_block_start", "index": 2,
         "content_block": {"type": "tool_use", "name": "weather", "input": {}}},
        {"type": "content_block_stop", "index": 2},
    ]  # fmt: skip
    parts = [one["delta"] for one in blocks if one["type"] == "content_block_delta" and one["index"] == 2]
    assert {part["type"] for part in parts} == {"input_json_delta"}
    assert json.loads("".join(part["partial_json"] for part in parts)) == {"city": "Berlin", "days": 3}


def test_a_call_is_a_block_that_ends_with_it_or_before_the_next():
    blocks = Blocks(shows_thinking=True)
    told = (CallBegun(0, "toolu_a", "one"), CallBegun(1, "toolu_b", "two"), CallEnd(1))
    kinds = [[re.findall(rb"event: (\w+)", part)[0].decode() for part in blocks.take(one)] for one in told]
    assert kinds == [["content_block_start"], ["content_block_stop", "content_block_start"], ["content_block_stop"]]


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_a_stream_is_the_answer_in_parts(client, says, size):
    says("It is May.</think>Gr\u00fc\u00dfe \U0001f600." + calls(invoke("Berlin", 3), invoke("Oslo", 1)), size=size)
    given = {**THINKS, "tools": [WEATHER]}
    whole = client.messages.create(**given)
    with client.messages.stream(**given) as stream:
        assert "".join(stream.text_stream) == "Gr\u00fc\u00dfe \U0001f600."
    final = stream.get_final_message()
    assert (final.usage, final.stop_reason) == (whole.usage, whole.stop_reason)
    assert final.stop_reason == "tool_use"
    assert [block.type for block in final.content] == ["thinking", "text", "tool_use", "tool_use"]
    for told, block in zip(final.content, whole.content, strict=True):
        ours, theirs = (block.model_dump(exclude={"id", "parsed_output"}) for block in (told, block))
        assert ours == theirs
    ids = [block.id for answer in (final, whole) for block in answer.content if block.type == "tool_use"]
    assert len(set(ids)) == 4


def test_the_official_client_sees_every_kind_of_event(client, says):
    says("It is May.</think>Fine." + CALL)
    with client.messages.stream(**THINKS, tools=[WEATHER]) as stream:
        kinds = {event.type for event in stream}
    assert kinds >= {
        "message_start",
        "thinking",
        "signature",
        "text",
        "input_json",
        "content_block_stop",
        "message_stop",
    }


def test_the_model_itself_answers(client):
    given = {**ASK, "max_tokens": 6, "extra_body": {"temperature": 0}}
    whole = client.messages.create(**given)
    assert (whole.stop_reason, whole.usage.output_tokens) == ("max_tokens", 6)
    with client.messages.stream(**given) as stream:
        assert "".join(stream.text_stream) == "".join(block.text for block in whole.content)
    assert stream.get_final_message().usage.output_tokens == 6


@pytest.mark.parametrize("stream", [False, True])
def test_stop_sequences_end_the_text_and_not_the_thinking(client, says, stream):
    says("No STOP here.</think>One. STOP Two.")
    given = {**THINKS, "stop_sequences": ["HALT", "STOP"]}
    if stream:
        with client.messages.stream(**given) as found:
            answer = found.get_final_message()
    else:
        answer = client.messages.create(**given)
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", "STOP")
    assert [block.thinking if block.type == "thinking" else block.text for block in answer.content] == [
        "No STOP here.", "One. ",
    ]  # fmt: skip


def test_text_that_may_begin_a_stop_sequence_stays_before_the_call(http, says):
    says("It is F" + CALL, size=1)
    given = {**ASK, "tools": [WEATHER], "stop_sequences": ["FOO"]}
    starts = [one["content_block"]["type"] for one in streamed(http, given) if one["type"] == "content_block_start"]
    assert starts == ["text", "tool_use"]
    assert post(http, given)["content"][0]["text"] == "It is F"


def test_an_answer_that_is_cut_says_so(http, says):
    cut = CALL[: CALL.index("3</")]
    says("Fine." + cut, ends=False)
    given = {**ASK, "tools": [WEATHER]}
    answer = post(http, given)
    assert answer["stop_reason"] == "max_tokens"
    assert answer["content"] == [{"type": "text", "text": "Fine."}]  # half a call is none
    found = streamed(http, given)
    assert found[-2]["delta"]["stop_reason"] == "max_tokens"
    starts = [one["index"] for one in found if one["type"] == "content_block_start"]
    assert starts == [one["index"] for one in found if one["type"] == "content_block_stop"] == [0, 1]


def test_a_call_that_the_model_does_not_end_is_no_use_of_a_tool(http, says):
    says("Fine." + CALL[: CALL.index("3</")])
    answer = post(http, {**ASK, "tools": [WEATHER]})
    assert (answer["stop_reason"], len(answer["content"])) == ("end_turn", 1)


# ---- tools ----


def history(content, *results):
    return [*ASK["messages"], {"role": "assistant", "content": content}, {"role": "user", "content": list(results)}]


def result(call_id, content, **more):
    return {"type": "tool_result", "tool_use_id": call_id, "content": content, **more}


def test_a_round_of_tools_with_thinking(client, says):
    asked = says("I must look.</think>Let me see." + CALL, "So it is.</think>Sunny.")
    first = client.messages.create(**THINKS, tools=[WEATHER])
    call = first.content[-1]
    assert (first.stop_reason, call.name, call.input) == ("tool_use", "weather", {"city": "Berlin", "days": 3})
    messages = history(
        first.content, result(call.id, [{"type": "text", "text": "sun"}]), {"type": "text", "text": "And?"}
    )
    second = client.messages.create(**{**THINKS, "messages": messages}, tools=[WEATHER])
    assert [block.type for block in second.content] == ["thinking", "text"]
    assert asked[1]["prompt"].startswith(asked[0]["prompt"] + "I must look.</think>Let me see." + CALL)
    assert asked[1]["prompt"].endswith(
        "<\uff5cUser\uff5c><tool_result>sun</tool_result>\n\nAnd?<\uff5cAssistant\uff5c><think>"
    )


def test_thinking_that_does_not_come_back_is_put_back(http, says):
    asked = says("I must look.</think>" + CALL)
    given = {**THINKS, "tools": [WEATHER], "metadata": {"user_id": "one"}}
    call = post(http, given)["content"][-1]
    lacking = {**given, "messages": history([call], result(call["id"], "sun"))}
    assert "<think>I must look.</think>" in prompt_of(http, asked, lacking)
    assert "I must look" not in prompt_of(http, asked, {**lacking, "metadata": {"user_id": "another"}})
    own = history([{"type": "thinking", "thinking": "Mine.", "signature": "?"}, call], result(call["id"], "sun"))
    assert "<think>Mine.</think>" in prompt_of(http, asked, {**lacking, "messages": own})


@pytest.mark.parametrize("size", [1, 1000])
def test_parallel_calls_can_be_turned_off(http, says, size):
    says("Fine." + calls(invoke("Berlin", 3), invoke("Oslo", 1)), size=size)
    given = {**ASK, "tools": [WEATHER]}
    for kind in ("auto", "any"):
        choice = {"type": kind, "disable_parallel_tool_use": True}
        answer = post(http, {**given, "tool_choice": choice})
        found = [block["input"]["city"] for block in answer["content"] if block["type"] == "tool_use"]
        assert (found, answer["stop_reason"]) == (["Berlin"], "tool_use")
        ends = [one["index"] for one in streamed(http, {**given, "tool_choice": choice})
                if one["type"] == "content_block_stop"]  # fmt: skip
        assert ends == [0, 1]
    assert len(post(http, given)["content"]) == 3


# ---- when things go wrong ----


class TestKeys:
    @pytest.fixture
    def options(self, tmp_path):
        (tmp_path / "keys").write_text("secret\n")
        return ServeOptions(key_file=str(tmp_path / "keys"))

    def test_both_ways_to_show_a_key(self, address, says):
        says("Fine.")
        for given in ({"api_key": "secret"}, {"auth_token": "secret"}):
            with anthropic.Anthropic(base_url=address, max_retries=0, **given) as client:
                assert client.messages.create(**ASK).content[0].text == "Fine."
        for given in ({"api_key": "wrong"}, {"auth_token": "wrong"}):
            with anthropic.Anthropic(base_url=address + "/anthropic", max_retries=0, **given) as client:
                for call in (lambda: client.messages.create(**ASK), lambda: client.messages.count_tokens(
                        model="toy", messages=ASK["messages"])):  # fmt: skip
                    with pytest.raises(anthropic.AuthenticationError) as refused:
                        call()
                    assert refused.value.body["error"]["type"] == "authentication_error"


@pytest.mark.parametrize("options", [ServeOptions(keep_alive_s=0.05)])
def test_silence_is_broken_with_pings(http, says, client):
    says("Fine.", size=1000, pause=0.3)
    found = streamed(http, ASK)
    kinds = [one["type"] for one in found]
    assert kinds[0] == "message_start"
    assert kinds.count("ping") >= 4
    with client.messages.stream(**ASK) as stream:
        assert "".join(stream.text_stream) == "Fine."
    response = http("POST", "/v1/messages", json=ASK)
    assert response.text.startswith("\n\n")
    assert response.json()["stop_reason"] == "end_turn"


def test_what_fails_after_the_first_event_is_an_event(http, client, service, monkeypatch):
    async def stream(*_, **__):
        yield Piece(id="said", token_ids=(), text="", finish="error", error="nothing is allowed")

    monkeypatch.setattr(service.engine, "stream", stream)
    *_, last = streamed(http, ASK)
    assert last == {
        "type": "error",
        "error": {"type": "api_error", "message": "no token can follow: nothing is allowed"},
    }
    with pytest.raises(anthropic.APIStatusError, match="nothing is allowed"), client.messages.stream(**ASK) as found:
        found.get_final_message()
    assert refusal(http, ASK, status=500)[0] == "api_error"


@pytest.mark.parametrize("options", [ServeOptions(max_waiting=0)])
def test_a_server_that_is_full_says_so(client, service):
    with ExitStack() as others:
        for _ in range(4):
            others.enter_context(service.admission.enter(""))
        with pytest.raises(anthropic.RateLimitError) as refused:
            client.messages.create(**ASK, stream=True)
    assert refused.value.body["error"]["type"] == "rate_limit_error"
    assert int(refused.value.response.headers["retry-after"]) >= 1
