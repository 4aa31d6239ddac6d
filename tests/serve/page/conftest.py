"""The page in a real browser, before a server that says what a test wrote down for it."""

import asyncio
import json
import shutil
import socket
import threading
import time
from collections import deque

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from dsv4.serve.page import CONTENT_SECURITY_POLICY, page_files

CHROMIUM = shutil.which("chromium")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
STEP_MS = 10_000  # how long the browser may take over one step of a test on a busy machine


class FakeServer:
    """The API with scripted answers. An answer is a list of deltas, usages, finish reasons, raw lines and gates."""

    def __init__(self):
        self.url = ""  # once it listens
        self.reset()
        routes = [Route(path, self._file) for path in page_files()]
        routes += [
            Route("/v1/models", self._models),
            Route("/v1/chat/completions", self._complete, methods=["POST"]),
        ]
        self.app = Starlette(routes=routes)

    def reset(self):
        self.answers = deque()
        self.requests = []  # the bodies of the completions asked for
        self.key = None  # asks for none
        self.num_left = 0  # streams whose reader went away

    async def _file(self, request):
        content, media_type = page_files()[request.url.path]
        return Response(content, media_type=media_type, headers={"Content-Security-Policy": CONTENT_SECURITY_POLICY})

    def _refusal(self, request):
        if self.key is None or request.headers.get("Authorization") == f"Bearer {self.key}":
            return None
        return JSONResponse({"error": {"message": "The key is missing or wrong."}}, status_code=401)

    async def _models(self, request):
        models = {"object": "list", "data": [{"id": "nano-chat", "context_length": 8192}]}
        return self._refusal(request) or JSONResponse(models)

    async def _complete(self, request):
        refusal = self._refusal(request)
        if refusal:
            return refusal
        self.requests.append(await request.json())
        answer = self.answers.popleft()
        return (
            answer
            if isinstance(answer, Response)
            else StreamingResponse(self._lines(answer), media_type="text/event-stream")
        )

    async def _lines(self, answer):
        """Server-sent events, with comments while a gate is closed."""
        try:
            for step in answer:
                if isinstance(step, threading.Event):
                    while not step.is_set():
                        yield ": keep-alive\n\n"
                        await asyncio.sleep(0.01)
                elif isinstance(step, str):
                    yield step
                else:
                    yield f"data: {json.dumps(step)}\n\n"
                    await asyncio.sleep(0.002)
        except asyncio.CancelledError:
            self.num_left += 1
            raise

    @staticmethod
    def delta(**fields):
        """A chunk with a piece of an answer."""
        return {"choices": [{"index": 0, "delta": fields, "finish_reason": None}], "usage": None}

    def thinks(self, text, size=3):
        return [self.delta(reasoning_content=text[at : at + size]) for at in range(0, len(text), size)]

    def says(self, text, size=3):
        return [self.delta(content=text[at : at + size]) for at in range(0, len(text), size)]

    def calls(self, name, arguments, *, index=0, size=4):
        """A tool call: its name, then its arguments in pieces."""
        head = {"index": index, "id": f"call_{name}_{index}", "type": "function"}
        parts = [arguments[at : at + size] for at in range(0, len(arguments), size)]
        return [
            self.delta(tool_calls=[{**head, "function": {"name": name, "arguments": ""}}]),
            *(self.delta(tool_calls=[{"index": index, "function": {"arguments": part}}]) for part in parts),
        ]

    @staticmethod
    def ends(finish="stop", **usage):
        """The last chunk, the usage if any, and the mark of the end."""
        last = {"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]}
        return [last, *([{"choices": [], "usage": usage}] if usage else []), "data: [DONE]\n\n"]


@pytest.fixture(scope="module")
def _server():
    fake = FakeServer()
    listener = socket.create_server(("127.0.0.1", 0))
    # One thread for the loop; the timeout ends streams that a test left open.
    config = uvicorn.Config(fake.app, log_level="error", lifespan="off", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    fake.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    yield fake
    server.should_exit = True
    thread.join(10)
    listener.close()


@pytest.fixture
def server(_server):
    _server.reset()
    return _server


@pytest.fixture(scope="module")
def _browser():
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(_browser, server):
    """Open the page in a browser of its own; whatever the page did wrong by itself fails the test at its end."""
    contexts, wrongs = [], []

    def open_(url=server.url, name="nano-chat", **options):
        context = _browser.new_context(**{"viewport": {"width": 1100, "height": 800}, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(STEP_MS)
        page.on("pageerror", lambda error: wrongs.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (wrongs.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda it: it.url.startswith(url) or wrongs.append(f"outside request: {it.url}"))
        page.on("console", lambda it: "Content Security Policy" in it.text and wrongs.append(it.text))
        page.goto(url)
        if server.key is None:
            page.get_by_text(name).first.wait_for()
        return page

    yield open_
    for context in contexts:
        context.close()
    assert wrongs == []


@pytest.fixture
def page(open_page):
    return open_page()
