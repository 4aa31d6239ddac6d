"""Clients that are slow, that stop, that take nothing, and that close one side of their connection."""

import asyncio
import socket
import time

import httpx
import pytest

from dsv4.serve import listen
from dsv4.serve.respond import Events

PATH = "/v1/chat/completions"
LONG = {"model": "toy", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1500, "ignore_eos": True}


def trickle(connection, data):
    """Send a byte now and then; whether the server has had enough of that."""
    for byte in data:
        try:
            connection.send(bytes([byte]))
        except OSError:
            return True
        time.sleep(0.02)
    return False


def test_a_head_must_come_in_time(served, wire, monkeypatch):
    monkeypatch.setattr(listen, "HEAD_S", 0.3)
    _, url = served()
    connection, begun = wire(url), time.monotonic()
    assert trickle(connection, b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: " + b"a" * 1000)
    assert time.monotonic() - begun < 15
    assert httpx.get(url + "/health").status_code == 200


def test_a_connection_on_which_nothing_comes_is_closed(served, wire, monkeypatch):
    monkeypatch.setattr(listen, "HEAD_S", 0.2)
    _, url = served()
    assert wire(url).rest() == b""


def test_the_second_request_of_a_connection_must_come_in_time_too(served, wire, monkeypatch):
    monkeypatch.setattr(listen, "HEAD_S", 0.5)
    _, url = served()
    connection = wire(url)
    for _ in range(2):
        connection.ask("GET", "/health")
        assert b'"ok"' in connection.until(b"}")
    connection.send(b"GET /hea")
    assert connection.rest() == b""


def test_an_answer_may_take_longer_than_a_head(served, wire, slow_down, monkeypatch):
    monkeypatch.setattr(listen, "HEAD_S", 0.2)
    service, url = served()
    slow_down(service, 0.1)
    connection = wire(url)
    connection.ask("POST", PATH, {**LONG, "max_tokens": 8})
    assert connection.until(b"}}").startswith(b"HTTP/1.1 200 ")


def test_what_follows_an_answer_without_end_is_cut_off(served, wire, monkeypatch):
    """The body of a request that needs none, which nobody waits for."""
    monkeypatch.setattr(listen, "HEAD_S", 0.3)
    _, url = served()
    connection = wire(url)
    connection.send(b"GET /health HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000000\r\n\r\n")
    assert trickle(connection, b" " * 1000)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_closes_its_side_is_freed(served, wire, slow_down, wait_for, stream):
    service, url = served()
    num_free = service.engine.pool.num_free
    slow_down(service)
    connection = wire(url)
    connection.ask("POST", PATH, {**LONG, "stream": stream})
    wait_for(lambda: service.admission.num_now == 1)
    connection.socket.shutdown(socket.SHUT_WR)
    wait_for(lambda: service.admission.num_now == 0, 10)
    wait_for(lambda: service.engine.pool.num_free == num_free, 10)
    connection.rest()  # and it hears that too


def test_a_short_answer_reaches_a_client_that_has_closed_its_side(served, wire):
    _, url = served()
    connection = wire(url)
    connection.ask("GET", "/health")
    connection.socket.shutdown(socket.SHUT_WR)
    assert b'"ok"' in connection.rest()


class Flood:
    """An application whose answer has no end."""

    def __init__(self):
        self.has_ended = False

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            for event in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{event}.complete"})
            return
        events = Events(self._events(), dialect="openai", keep_alive_s=60, limit_s=600, failed=lambda error: b"")
        await events(scope, receive, send)

    async def _events(self):
        try:
            while True:
                yield b"x" * 2**18
                await asyncio.sleep(0)
        finally:
            self.has_ended = True


def test_a_client_that_takes_nothing_any_more_is_cut_off(run_app, wire, wait_for, monkeypatch):
    monkeypatch.setattr(listen, "STALL_S", 0.4)
    flood = Flood()
    connection = wire(run_app(flood), receive_bytes=2**17)
    connection.ask("GET", "/")
    end = time.monotonic() + 1.5
    while time.monotonic() < end:  # a client that takes a little is waited for
        assert connection.socket.recv(2**16)
        time.sleep(0.01)
        assert not flood.has_ended
    wait_for(lambda: flood.has_ended, 20)
    connection.rest()


def test_events_wait_for_a_client_that_is_slow():
    """What makes them stands still meanwhile, and is closed if the client goes."""
    made, closed = [], []

    async def source():
        try:
            for i in range(50):
                made.append(i)
                yield b"%d," % i
        finally:
            closed.append(True)

    async def run(leaves):
        made.clear()
        closed.clear()
        gone, read, sent = asyncio.Event(), asyncio.Event(), []

        async def receive():
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            await read.wait()
            await asyncio.sleep(0)
            sent.append(message.get("body", b""))

        events = Events(source(), dialect="openai", keep_alive_s=60, limit_s=60, failed=lambda error: b"")
        task = asyncio.create_task(events({"type": "http"}, receive, send))
        await asyncio.sleep(0.05)
        assert len(made) == 1
        assert not closed
        if leaves:
            gone.set()
        read.set()
        await asyncio.wait_for(task, 30)
        assert closed == [True]
        return b"".join(sent)

    whole = asyncio.run(run(leaves=False))
    assert whole == b"".join(b"%d," % i for i in range(50))
    assert len(asyncio.run(run(leaves=True))) < len(whole) // 2
