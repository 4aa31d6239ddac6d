"""A tiny model behind the server: in this process, or on a port for clients that want one.

Its own words are noise. A test that is about what a model says puts words into its mouth: ``says``.
"""

import asyncio
import json
import socket
import threading
import time
from contextlib import ExitStack, closing, contextmanager

import httpx
import pytest

from dsv4.config.engine import Limits
from dsv4.config.serve import ServeOptions
from dsv4.data.tokenizer import num_ids, train_tokenizer
from dsv4.engine.engine import Engine
from dsv4.engine.outputs import Completion, Piece
from dsv4.serve.app import create_app
from dsv4.serve.listen import Server, bind, settings
from dsv4.serve.service import Service
from dsv4.testing.toys import tiny_model
from dsv4.text.passages import OWN

TEXT = """The weather in Berlin is fine and the weather in Oslo is not. def add(a, b): return a + b
{"city": "Berlin", "unit": "celsius", "days": 3} name: value, key = "text"; print(f"{x}") and so on, again and again.
"""
MODEL = "toy"


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(iter([TEXT] * 4), 330)


@pytest.fixture(scope="session")
def make_service(tokenizer):
    """Make a service whose model has 2048 tokens of context and hardly any weights."""
    model = tiny_model(num_ids(tokenizer), max_context=2048)

    def make(options=None, **limits):
        given = {"max_requests": 4, "step_tokens": 256, "cache_bytes": 2**20, **limits}
        engine = Engine(model, Limits(**given), tokenizer=tokenizer)
        return Service(engine, tokenizer, OWN, options or ServeOptions(), name=MODEL, created=1_780_000_000)

    return make


@pytest.fixture
def service(make_service):
    service = make_service()
    yield service
    service.engine.close()


@pytest.fixture
def says(service, monkeypatch):
    """Let the model say a text, so many tokens in a piece; return the requests that it was asked.

    With ``ends=False`` the answer is cut where the text is.
    """
    asked = []

    def say(*texts, size=1, ends=True, pause=None):
        spoken = iter(texts) if len(texts) > 1 else None

        async def stream(prompt, sampling=None, *, salt=b"", mask=None):
            text = texts[0] if spoken is None else next(spoken)
            ids = service.tokenizer.encode(text, add_special_tokens=False).ids + ([service.eos] if ends else [])
            asked.append({"prompt": service.tokenizer.decode(prompt, skip_special_tokens=False), "sampling": sampling,
                          "salt": salt, "mask": mask})  # fmt: skip
            id = f"said-{len(asked)}"
            service.engine._ended[id] = Completion(id=id, prompt_ids=list(prompt), num_cached=128)
            for begin in range(0, len(ids), size):
                if pause is not None:
                    await asyncio.sleep(pause)
                part = tuple(ids[begin : begin + size])
                is_last = begin + size >= len(ids)
                yield Piece(id=id, token_ids=part, text="", finish=("stop" if ends else "length") if is_last else None)

        monkeypatch.setattr(service.engine, "stream", stream)
        return asked

    return say


@pytest.fixture
def app(service):
    return create_app(service)


@pytest.fixture
def http(app):
    """Call the application in this process: ``http(method, path, json=..., headers=...)``."""

    def call(method, path, **given):
        async def run():
            transport = httpx.ASGITransport(app=app)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60) as client:
                return await client.request(method, path, **given)

        return asyncio.run(run())

    return call


@contextmanager
def listening(app, options):
    """Run an application on a free port of this machine; give its address."""
    server = Server(settings(app, options))
    listener = bind("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(60)
        listener.close()
        assert not thread.is_alive()


@pytest.fixture
def served(make_service):
    """Run servers: ``served(options, **limits)`` gives a service and its address."""
    with ExitStack() as stack:

        def run(options=None, **limits):
            service = make_service(options, **limits)
            return service, stack.enter_context(listening(create_app(service), service.options))

        yield run


@pytest.fixture
def run_app():
    """Run applications that are none of ours: ``run_app(app)`` gives an address."""
    with ExitStack() as stack:
        yield lambda app: stack.enter_context(listening(app, ServeOptions()))


class Wire:
    """A connection to a server, on which a test says what it likes."""

    def __init__(self, url, *, receive_bytes=None, timeout=30):
        self.socket = socket.socket()
        if receive_bytes is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        self.socket.settimeout(timeout)
        host, port = url.removeprefix("http://").split(":")
        self.socket.connect((host, int(port)))

    def send(self, data):
        self.socket.sendall(data)

    def ask(self, method, path, body=None, *headers):
        """Send a request, whose body may be bytes or what becomes JSON."""
        data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        lines = [f"{method} {path} HTTP/1.1", "host: localhost", "content-type: application/json",
                 f"content-length: {len(data)}", *headers]  # fmt: skip
        self.send("\r\n".join(lines).encode() + b"\r\n\r\n" + data)

    def until(self, mark):
        """Read up to ``mark``, or to the end."""
        got = b""
        while mark not in got:
            try:
                part = self.socket.recv(4096)
            except ConnectionResetError:
                part = b""
            if not part:
                break
            got += part
        return got

    def rest(self):
        """Read until the server closes."""
        return self.until(b"\0no such mark")

    def close(self):
        self.socket.close()


@pytest.fixture
def wire():
    """Open connections: ``wire(url)``."""
    with ExitStack() as stack:
        yield lambda url, **given: stack.enter_context(closing(Wire(url, **given)))


@pytest.fixture
def slow_down(monkeypatch):
    """Let each step of a service's engine take a while: ``slow_down(service)``."""

    def slow(service, seconds=0.02):
        step = service.engine.step

        def slowly():
            time.sleep(seconds)
            return step()

        monkeypatch.setattr(service.engine, "step", slowly)

    return slow


@pytest.fixture
def wait_for():
    """Wait until something is so, for a time in which any machine does it."""

    def wait(is_so, seconds=30):
        end = time.monotonic() + seconds
        while not is_so():
            assert time.monotonic() < end, "it does not come about"
            time.sleep(0.005)

    return wait


@pytest.fixture
def address(app, service):
    with listening(app, service.options) as url:
        yield url
