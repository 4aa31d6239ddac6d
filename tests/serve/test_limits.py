"""How much, how long and how many: sizes of bodies and heads, times, places, and what clients are told."""

import asyncio
import json
import time

import httpx
import pytest
from anthropic import Anthropic
from openai import APIStatusError, OpenAI, RateLimitError

from dsv4.config.serve import ServeOptions
from dsv4.serve import listen
from dsv4.serve.admission import Admission
from dsv4.serve.errors import ApiError
from dsv4.serve.respond import Events, Later

CHAT = {"model": "toy", "messages": [{"role": "user", "content": "the weather"}], "max_tokens": 2}
LONG = {**CHAT, "max_tokens": 1500, "ignore_eos": True, "stream": True}
PATH = "/v1/chat/completions"
JSON = "content-type: application/json"


# ---- bodies and heads ----


def test_a_body_that_is_too_large_is_refused_before_it_comes(served, wire):
    _, url = served(ServeOptions(max_body_bytes=1000))
    connection = wire(url)
    connection.send(f"POST {PATH} HTTP/1.1\r\nhost: localhost\r\n{JSON}\r\ncontent-length: 100000\r\n\r\n".encode())
    answer = connection.until(b"}}")
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"expected at most 1000" in answer
    connection.send(b" " * 100_000)  # what comes all the same is thrown away, and the connection goes on
    connection.ask("GET", "/health")
    assert b'"ok"' in connection.until(b"}")


def test_a_body_of_unknown_length_is_cut_at_the_limit(served, wire, monkeypatch):
    monkeypatch.setattr(listen, "HEAD_S", 0.3)
    _, url = served(ServeOptions(max_body_bytes=1000))
    connection = wire(url)
    connection.send(f"POST {PATH} HTTP/1.1\r\nhost: localhost\r\n{JSON}\r\ntransfer-encoding: chunked\r\n\r\n".encode())
    for _ in range(3):
        connection.send(b"200\r\n" + b" " * 512 + b"\r\n")
    assert connection.until(b"}}").startswith(b"HTTP/1.1 413 ")
    with pytest.raises(OSError, match=r"reset|[Pp]ipe"):
        endless(connection)


def endless(connection):
    while True:
        connection.send(b"200\r\n" + b" " * 512 + b"\r\n")
        time.sleep(0.01)


def test_a_body_of_just_the_limit_is_taken(served):
    body = json.dumps(CHAT).encode()
    _, url = served(ServeOptions(max_body_bytes=len(body)))
    assert httpx.post(url + PATH, content=body, headers={"content-type": "application/json"}).status_code == 200
    assert httpx.post(url + PATH, content=body + b" ", headers={"content-type": "application/json"}).status_code == 413


def test_the_official_client_hears_that_its_body_is_too_large(served):
    _, url = served(ServeOptions(max_body_bytes=2**16))
    with OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client, pytest.raises(APIStatusError) as caught:
        client.completions.create(model="toy", prompt="x" * 2**23)
    assert caught.value.status_code == 413


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_only_json_is_taken(http, kind):
    found = http("POST", PATH, content=json.dumps(CHAT).encode(), headers={"content-type": kind})
    assert found.status_code == 415
    assert "expected application/json" in found.json()["error"]["message"]


def test_only_bodies_as_they_are_are_taken(http):
    headers = {"content-type": "application/json; charset=utf-8", "content-encoding": "gzip"}
    assert http("POST", PATH, content=b"\x1f\x8b\x08", headers=headers).status_code == 415
    headers["content-encoding"] = "identity"
    assert http("POST", PATH, content=json.dumps(CHAT).encode(), headers=headers).status_code == 200


@pytest.mark.parametrize("end", ["", "\r\n\r\n"])
@pytest.mark.parametrize(
    "head",
    [
        "GET /health HTTP/1.1\r\nhost: localhost\r\nx: " + "a" * listen.MAX_HEADER_BYTES,
        "GET /health?" + "a" * listen.MAX_HEADER_BYTES + " HTTP/1.1\r\nhost: localhost",
        "GET /health HTTP/1.1\r\nhost: localhost" + "\r\nxxx: aaaaaaaaaaa" * (listen.MAX_HEADER_BYTES // 14),
    ],
)
def test_a_head_that_is_too_large_is_refused(served, wire, head, end):
    """Not much larger, so that all of it is read before the connection is closed, and the answer arrives."""
    _, url = served()
    connection = wire(url)
    connection.send(f"{head}{end}".encode())
    assert connection.rest().startswith(b"HTTP/1.1 400 ")
    assert httpx.get(url + "/health").json()["requests"] == 0


# ---- times ----


def test_a_body_must_come_in_time(served, wire):
    _, url = served(ServeOptions(body_timeout_s=0.3))
    connection = wire(url)
    connection.send(f"POST {PATH} HTTP/1.1\r\nhost: localhost\r\n{JSON}\r\ncontent-length: 100\r\n\r\n{{".encode())
    assert connection.rest().startswith(b"HTTP/1.1 408 ")


async def called(response):
    """What a response sends to a client that stays."""
    sent = []

    async def receive():
        await asyncio.sleep(3600)

    async def send(message):
        sent.append(message)

    await response({"type": "http"}, receive, send)
    return sent[0].get("status"), [message["body"] for message in sent[1:]]


def told(error):
    return b"failed: " + error.message.encode()


def test_an_answer_must_come_in_time():
    async def slow():
        await asyncio.sleep(3600)
        return {}

    status, parts = asyncio.run(called(Later(slow, dialect="openai", keep_alive_s=60, limit_s=0.05)))
    assert status == 504
    assert json.loads(b"".join(parts))["error"]["code"] == "timeout"


def test_a_stream_must_end_in_time():
    async def slow(first):
        if first:
            yield b"first "
        await asyncio.sleep(3600)

    def events(first):
        return Events(slow(first), dialect="openai", keep_alive_s=60, limit_s=0.05, failed=told)

    status, parts = asyncio.run(called(events(True)))
    assert status == 200
    assert b"".join(parts) == b"first failed: the request took longer than 0.05 s, which is the limit"
    status, parts = asyncio.run(called(events(False)))
    assert status == 504


def test_requests_are_given_up_after_their_time(served, slow_down):
    service, url = served(ServeOptions(request_timeout_s=0.4))
    slow_down(service)
    with httpx.stream("POST", url + PATH, json={**LONG, "n": 4}, timeout=60) as response:
        events = response.read().decode().strip().split("\n\n")
    assert response.status_code == 200
    assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "timeout"
    assert service.admission.num_now == 0
    assert httpx.post(url + PATH, json={**LONG, "stream": False}, timeout=60).status_code == 504


def test_silence_is_broken():
    async def slow():
        await asyncio.sleep(0.2)
        return {"a": 1}

    status, parts = asyncio.run(called(Later(slow, dialect="openai", keep_alive_s=0.02, limit_s=60)))
    assert status == 200
    assert parts[-1] == b'{"a":1}'
    assert len(parts) >= 4
    assert set(parts[:-1]) == {b"\n"}

    async def events():
        await asyncio.sleep(0.2)
        yield b"data: 1\n\n"
        await asyncio.sleep(0.2)

    response = Events(events(), dialect="openai", keep_alive_s=0.02, limit_s=60, failed=told, silence=b": wait\n\n")
    status, parts = asyncio.run(called(response))
    assert parts.count(b": wait\n\n") >= 6
    assert [part for part in parts if part != b": wait\n\n"] == [b"data: 1\n\n", b""]


def test_what_fails_after_silence_is_told_in_the_body():
    async def fails():
        await asyncio.sleep(0.1)
        raise ApiError(429, "no place")

    status, parts = asyncio.run(called(Later(fails, dialect="anthropic", keep_alive_s=0.02, limit_s=60)))
    assert status == 200
    assert json.loads(b"".join(parts))["error"]["type"] == "rate_limit_error"


def test_the_official_clients_read_through_silence(served, slow_down):
    service, url = served(ServeOptions(keep_alive_s=0.01))
    slow_down(service, 0.1)
    with OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
        assert client.chat.completions.create(**CHAT).usage.completion_tokens == 2
        *_, last = client.chat.completions.create(**CHAT, stream=True, stream_options={"include_usage": True})
        assert last.usage.completion_tokens == 2
    with Anthropic(base_url=url, api_key="none", max_retries=0) as client:
        assert client.messages.create(**CHAT).usage.output_tokens == 2
        *_, last = client.messages.create(**CHAT, stream=True)
        assert last.type == "message_stop"


# ---- places ----


def test_one_more_than_there_are_places_is_told_when_to_come_back(served, slow_down):
    service, url = served(ServeOptions(max_waiting=1), max_requests=1)
    slow_down(service)
    with OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
        streams = [client.chat.completions.create(**CHAT | {"max_tokens": 1500, "stream": True}) for _ in range(2)]
        with pytest.raises(RateLimitError) as caught:
            client.chat.completions.create(**CHAT)
        assert caught.value.code == "rate_limit_exceeded"
        assert int(caught.value.response.headers["retry-after"]) >= 1
        for stream in streams:
            stream.close()


def test_each_key_has_its_places(served, slow_down, tmp_path, wait_for):
    (tmp_path / "keys").write_text("one\ntwo\n")
    service, url = served(ServeOptions(max_per_key=2, key_file=str(tmp_path / "keys")))
    slow_down(service)

    def ask(key, **more):
        return httpx.post(url + PATH, json={**CHAT, **more}, headers={"x-api-key": key}, timeout=60)

    with httpx.stream("POST", url + PATH, json=LONG, headers={"x-api-key": "one"}, timeout=60) as stream:
        events = stream.iter_raw()  # which closes the stream when it is let go of
        next(events)
        assert ask("one").status_code == 200
        refused = ask("one", n=2)
        assert refused.status_code == 429
        assert "of this key" in refused.json()["error"]["message"]
        assert ask("two", n=2).status_code == 200
    wait_for(lambda: service.admission.num_now == 0)
    assert ask("one", n=2).status_code == 200


def test_a_crowd_is_refused_before_its_answers_begin(served):
    """All of it comes at once; each is let in or refused by its status, and none in the middle of a stream."""
    _, url = served(ServeOptions(max_waiting=3), max_requests=2)

    async def crowd():
        async with httpx.AsyncClient(timeout=60) as client:
            body = {**CHAT, "stream": True}
            return await asyncio.gather(*[client.post(url + PATH, json=body) for _ in range(30)])

    found = asyncio.run(crowd())
    assert {one.status_code for one in found} == {200, 429}
    assert sum(one.status_code == 200 for one in found) >= 5
    assert all(one.text.rstrip().endswith("[DONE]") for one in found if one.status_code == 200)


def test_places_are_kept_from_the_check_on(monkeypatch):
    admission = Admission(3, 2)
    admission.check("a", 2)
    for key, num in (("a", 1), ("b", 2)):
        with pytest.raises(ApiError) as caught:
            admission.check(key, num)
        assert caught.value.status == 429
    with admission.enter("a"), admission.enter("a"):
        assert admission.num_now == 2
        with pytest.raises(ApiError), admission.enter("a"):
            pass
        admission.check("b")
        with pytest.raises(ApiError), admission.enter("c"):
            pass
        with admission.enter("b"):
            assert admission.num_now == 3
    assert admission.num_now == 0
    admission.check("a", 2)  # nobody comes
    now = time.monotonic()
    monkeypatch.setattr("dsv4.serve.admission.time.monotonic", lambda: now + 6)
    admission.check("a", 2)


def test_who_comes_back_is_told_how_long_requests_take():
    admission = Admission(0, 0)
    for _ in range(100):
        admission.took(20.0)
    with pytest.raises(ApiError) as caught:
        admission.check("")
    assert caught.value.headers["retry-after"] == "20"
