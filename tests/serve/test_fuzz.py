"""Bodies and heads that nobody meant: never an error of the server, never a wait without end."""

import json
import random
import socket

import httpx
import pytest

CHAT = {
    "model": "toy", "max_tokens": 2, "temperature": 0.5, "stream": False, "stop": ["a"],
    "logit_bias": {"5": 1.5}, "n": 1, "user": "u", "seed": 3,
    "messages": [
        {"role": "system", "content": "be"}, {"role": "user", "content": [{"type": "text", "text": "x"}]},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}]},
        {"role": "tool", "tool_call_id": "1", "content": "y"},
    ],
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {}}}}}],
    "tool_choice": "auto", "response_format": {"type": "text"}, "thinking": {"type": "disabled"},
}  # fmt: skip
MESSAGE = {
    "model": "toy", "max_tokens": 2, "system": [{"type": "text", "text": "be"}], "stream": True,
    "messages": [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {"a": 1}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "y"}]},
    ],
    "tools": [{"name": "f", "input_schema": {"type": "object"}}],
    "thinking": {"type": "enabled", "budget_tokens": 2000}, "metadata": {"user_id": "u"}, "stop_sequences": ["a"],
}  # fmt: skip
RESPONSE = {
    "model": "toy", "max_output_tokens": 2, "instructions": "be", "stream": True, "reasoning": {"effort": "low"},
    "input": [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "x"}]},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": "y"},
    ],
    "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}}],
    "text": {"format": {"type": "text"}},
}  # fmt: skip
TEXT = {"model": "toy", "prompt": ["x", "y"], "max_tokens": 2, "logprobs": 1, "suffix": None, "echo": True}
COUNTED = {name: MESSAGE[name] for name in ("model", "system", "messages", "tools", "thinking")}
VALID = {
    "/v1/chat/completions": CHAT, "/v1/messages": MESSAGE, "/v1/messages/count_tokens": COUNTED,
    "/v1/responses": RESPONSE, "/v1/completions": TEXT, "/tokenize": {"text": "x"}, "/detokenize": {"tokens": [5, 6]},
}  # fmt: skip
VALUES = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**40, 0.5, -0.0, 1e308, "", "x", "\x00", "\U0001f600", "\u2028",
    "a" * 3000, [], {}, [[]], [None], {"": None}, {"type": "text"}, {"type": "object"}, "</think>",
    "<\uff5cDSML\uff5c>", "toy", "none", {"$ref": "#"}, {"type": ["string", 5]}, {"enum": []}, {"pattern": "("},
    {"anyOf": [{}]}, "required", "json_schema",
)  # fmt: skip
NAMES = (
    b"host", b"content-length", b"transfer-encoding", b"expect", b"connection", b"upgrade", b"authorization",
    b"x-api-key", b"content-encoding", b"accept", b"range", b"te", b"trailer", b"x-forwarded-for", b"origin", b"cookie",
    b"\xff", b"a b", b"",
)  # fmt: skip
TEXTS = (
    b"", b"0", b"5", b"-1", b"99999999999999999999", b"chunked", b"gzip, chunked", b"100-continue", b"close",
    b"keep-alive", b"websocket", b"h2c", b"Bearer x", b"Bearer", b"bytes=0-", b"\xff\xfe", b"a" * 5000,
    b"application/json", b"\x00", b"*", b"localhost:99999", b"[::1", b"text/html;q=x",
)  # fmt: skip
BITS = (
    b"\x00",
    b"\xff",
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"\\",
    b"\\u12",
    b"1e999",
    b"NaN",
    b"//",
    b"\xed\xa0\x80",
)


def places(value, path=()):
    """Where something can be changed in a value."""
    yield path
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in pairs:
        yield from places(one, (*path, key))


def changed(value, path, new):
    """A value with another at a place; ``...`` takes it away."""
    if not path:
        return new if new is not ... else {}
    copy = value.copy()
    one = changed(value[path[0]], path[1:], new) if path[1:] else new
    if one is ...:
        del copy[path[0]]
    else:
        copy[path[0]] = one
    return copy


def mutated(generator, value):
    """The bytes of a body that differs from a valid one in a place or two, as JSON or as bytes."""
    for _ in range(generator.randint(1, 2)):
        if isinstance(value, dict | list):
            new = generator.choice((..., *VALUES))
            value = changed(value, generator.choice(list(places(value))), new)
    data = json.dumps(value).encode()
    if generator.random() < 0.25:
        begin = generator.randrange(len(data) + 1)
        end = min(len(data), begin + generator.randint(0, 4))
        data = data[:begin] + generator.choice(BITS) + data[end:]
    return data


@pytest.mark.parametrize("path", VALID)
def test_bodies(served, wire, path):
    service, url = served()
    generator = random.Random(f"bodies {path}")
    found, connection = {}, wire(url, timeout=60)
    for _ in range(80):
        body = mutated(generator, VALID[path])
        connection.ask("POST", path, body)
        head = connection.until(b"\r\n\r\n")
        status = head.split(b" ", 2)[1]
        found[status] = found.get(status, 0) + 1
        assert status in (b"200", b"400", b"404"), body
        if b"chunked" in head:
            rest = head.partition(b"\r\n\r\n")[2]
            while not rest.endswith(b"0\r\n\r\n"):
                rest += connection.until(b"\n")
            assert b"server_error" not in rest, body
        else:
            length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
            rest = head.partition(b"\r\n\r\n")[2]
            while len(rest) < length:
                rest += connection.socket.recv(length - len(rest))
    assert set(found) >= {b"200", b"400"}  # or nothing of what was sent was nearly right
    assert httpx.get(url + "/health").json() == {"status": "ok", "model": "toy", "requests": 0}
    assert service.engine.is_idle


def test_heads(served, wire):
    _, url = served()
    generator = random.Random("heads")
    body = json.dumps({"text": "x"}).encode()
    found = set()
    for _ in range(150):
        method = generator.choice(
            (b"POST", b"POST", b"GET", b"HEAD", b"OPTIONS", b"DELETE", b"PUT", b"CONNECT", b"\xff", b"")
        )
        path = generator.choice(
            (b"/tokenize", b"/health", b"*", b"//", b"/%", b"/%00", b"http://x/y", b"/\xff", b"?a", b"")
        )
        version = generator.choice((b"HTTP/1.1",) * 6 + (b"HTTP/1.0", b"HTTP/2.0", b"", b"HTTP/9"))
        lines = [b" ".join((method, path, version)), b"host: localhost", b"content-type: application/json"]
        if generator.random() < 0.7:
            lines.append(b"content-length: %d" % len(body))
        lines += [generator.choice(NAMES) + generator.choice((b": ", b":", b" :", b"")) + generator.choice(TEXTS)
                  for _ in range(generator.randint(0, 3))]  # fmt: skip
        data = generator.choice((b"\r\n",) * 8 + (b"\n", b"\r")).join(lines) + b"\r\n\r\n" + body
        connection = wire(url)
        connection.send(data)
        connection.socket.shutdown(socket.SHUT_WR)  # so that what waits for more gets no more
        status = connection.rest().split(b" ", 2)[1:2]
        found.update(status)
        connection.close()
        assert not status or not status[0].startswith(b"5"), data
    assert found >= {b"200", b"400", b"404", b"405"}
    assert httpx.get(url + "/health").json()["requests"] == 0


def test_noise(served, wire):
    """What is no HTTP at all, the greeting of a TLS client among it."""
    _, url = served()
    generator = random.Random("noise")
    for i in range(40):
        data = b"\x16\x03\x01\x02\x00\x01" if not i else b""
        data += generator.randbytes(generator.choice((1, 10, 1000, 100_000)))
        connection = wire(url)
        try:
            connection.send(data)
            connection.socket.shutdown(socket.SHUT_WR)
            assert b" 500 " not in connection.rest()
        except (BrokenPipeError, ConnectionResetError):
            pass  # it was closed while that came
        connection.close()
    assert httpx.get(url + "/health").json()["requests"] == 0
