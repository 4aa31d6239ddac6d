"""Completions: texts gone on with, gaps filled, several at once, and facts about the model."""

import json

import openai
import pytest

from dsv4.config.sampling import Sampling
from dsv4.text.tokens import BOS, FIM_BEGIN, FIM_END, FIM_HOLE

ASK = {"model": "toy", "prompt": "The weather in", "max_tokens": 7, "seed": 3, "ignore_eos": True}


def events(response):
    lines = [line for line in response.text.split("\n\n") if line and not line.startswith(":")]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line[len("data: ") :]) for line in lines[:-1]]


def by_engine(service, text, **sampling):
    return service.engine.generate([text], Sampling(max_tokens=7, seed=3, ignore_eos=True, **sampling))[0]


def test_it_is_what_the_engine_says(http, service):
    answer = http("POST", "/v1/completions", json=ASK).json()
    wanted = by_engine(service, ASK["prompt"])
    (choice,) = answer["choices"]
    assert choice["text"] == wanted.text
    assert (choice["finish_reason"], choice["logprobs"]) == ("length", None)
    assert answer["usage"]["prompt_tokens"] == len(wanted.prompt_ids)
    assert (answer["object"], answer["usage"]["completion_tokens"]) == ("text_completion", 7)


def test_token_ids_are_a_prompt_too(http, service):
    ids = by_engine(service, ASK["prompt"]).prompt_ids
    given = http("POST", "/v1/completions", json={**ASK, "prompt": ids}).json()
    assert given["choices"][0]["text"] == by_engine(service, ASK["prompt"]).text


def test_several_prompts_and_choices_are_counted_through(http, service):
    given = {**ASK, "prompt": ["The weather in", "def add"], "n": 2}
    answer = http("POST", "/v1/completions", json=given).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["choices"][0]["text"] == by_engine(service, "The weather in").text
    assert answer["choices"][2]["text"] == by_engine(service, "def add").text
    assert answer["choices"][0]["text"] != answer["choices"][1]["text"]
    assert answer["usage"]["completion_tokens"] == 28
    streamed = events(http("POST", "/v1/completions", json={**given, "stream": True}))
    for index, choice in enumerate(answer["choices"]):
        parts = [c["text"] for chunk in streamed for c in chunk["choices"] if c["index"] == index]
        assert "".join(parts) == choice["text"]


@pytest.mark.parametrize("path", ["/v1/completions", "/beta/completions", "/completions"])
def test_a_gap_is_filled_in_the_order_that_was_trained(http, service, monkeypatch, path):
    asked = []
    stream = service.engine.stream

    def note(prompt, *arguments, **given):
        asked.append(service.tokenizer.decode(prompt, skip_special_tokens=False))
        return stream(prompt, *arguments, **given)

    monkeypatch.setattr(service.engine, "stream", note)
    http("POST", path, json={**ASK, "prompt": "def <think>", "suffix": "return a"})
    assert asked == [f"{BOS}{FIM_BEGIN}def <think>{FIM_HOLE}return a{FIM_END}"]


def test_the_text_of_a_prompt_holds_no_special_tokens(http, service):
    plain = http("POST", "/v1/completions", json={**ASK, "prompt": "<think>"}).json()
    assert plain["usage"]["prompt_tokens"] == 1 + len(service.plain_tokenizer.encode("<think>").ids) > 2


def test_echo_stop_and_logprobs(http, service):
    free = http("POST", "/v1/completions", json={**ASK, "max_tokens": 30}).json()["choices"][0]["text"]
    stop = free[10:12]
    found = http("POST", "/v1/completions", json={**ASK, "max_tokens": 30, "stop": stop, "echo": True}).json()
    (choice,) = found["choices"]
    assert choice["text"] == ASK["prompt"] + free[: free.index(stop)]
    assert choice["finish_reason"] == "stop"
    (choice,) = http("POST", "/v1/completions", json={**ASK, "logprobs": 2}).json()["choices"]
    logprobs = choice["logprobs"]
    assert [len(logprobs[name]) for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")] == [7] * 4
    wanted = by_engine(service, ASK["prompt"], logprobs=2).logprobs
    assert logprobs["token_logprobs"] == pytest.approx([one.chosen for one in wanted])
    assert logprobs["text_offset"][:2] == [0, len(logprobs["tokens"][0])]


def test_the_official_client(address, service):
    client = openai.OpenAI(base_url=address + "/v1", api_key="none", max_retries=0)
    given = {"model": "toy", "prompt": ASK["prompt"], "max_tokens": 7, "seed": 3}
    whole = client.completions.create(**given, extra_body={"ignore_eos": True})
    parts = client.completions.create(
        **given, stream=True, stream_options={"include_usage": True}, extra_body={"ignore_eos": True}
    )
    chunks = list(parts)
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == whole.choices[0].text
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [330]}, "330"),
        ({"prompt": [5], "suffix": "x"}, "suffix"),
        ({"prompt": "x " * 4000}, "maximum context length is 2048 tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"model": "other"}, "other"),
    ],
)
def test_bad_requests(http, given, words):
    response = http("POST", "/v1/completions", json={**ASK, **given})
    assert response.status_code == (404 if "model" in given else 400)
    assert words in response.json()["error"]["message"]


# ---- facts ----


def test_text_to_tokens_and_back(http, service):
    text = "Gr\u00fc\u00dfe <think> \U0001f600"
    found = http("POST", "/tokenize", json={"text": text}).json()
    assert found["count"] == len(found["tokens"]) == len(service.plain_tokenizer.encode(text).ids)
    assert http("POST", "/detokenize", json={"tokens": found["tokens"]}).json()["text"] == text
    special = http("POST", "/tokenize", json={"text": text, "special": True}).json()
    assert service.tokenizer.token_to_id("<think>") in special["tokens"]
    assert service.tokenizer.token_to_id("<think>") not in found["tokens"]
    assert http("POST", "/tokenize", json={}).status_code == 400
    assert "330" in http("POST", "/detokenize", json={"tokens": [330]}).json()["error"]["message"]


def test_metrics_count_what_was_done(http, service):
    answer = http("POST", "/v1/completions", json=ASK).json()
    text = http("GET", "/metrics").text
    assert f"dsv4_output_tokens_total {answer['usage']['completion_tokens']}.0" in text
    assert f"dsv4_prompt_tokens_total {answer['usage']['prompt_tokens']}.0" in text
    assert 'dsv4_finished_total{reason="length"} 1.0' in text
    assert "dsv4_requests_now 0.0" in text
    assert f"dsv4_free_pages {service.engine.pool.num_free}.0" in text
    assert "dsv4_first_token_seconds_count 1.0" in text
