"""The door: who may come in, with how much, for how long, and what is written about it.

One ASGI layer around the application. It reads a request's body whole, within a size and a time, before anything else
looks at it, so no handler waits for a client that is slow or has gone.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
import re
import secrets
import time
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dsv4.config.serve import ServeOptions
from dsv4.serve.errors import ApiError, Dialect
from dsv4.serve.metrics import Metrics
from dsv4.serve.respond import STOPPING, dumps

KEY = "dsv4.key"  # in a request's scope: a name for the key it came with
REQUEST_ID = "dsv4.request_id"
ID_HEADERS: dict[Dialect, tuple[bytes, ...]] = {
    "openai": (b"x-request-id",),
    "anthropic": (b"x-request-id", b"request-id"),
}
"""Where each protocol's clients look for the id by which the log names their request."""
OPEN_PATHS = ("/", "/health")
OPEN_FOLDER = "/page/"
PORT = re.compile(r":\d*$")

log = logging.getLogger("dsv4.serve")


class Guard:
    """Lets requests through to ``app``, or answers them itself. paths: those to count by name."""

    def __init__(self, app: ASGIApp, options: ServeOptions, metrics: Metrics, paths: frozenset[str]) -> None:
        self._app, self._options, self._metrics, self._paths = app, options, metrics, paths
        self._keys = [] if options.key_file is None else [_digest(key) for key in read_keys(Path(options.key_file))]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, status, is_whole = time.monotonic(), 0, False
        path = scope["path"] if scope["path"] in self._paths else "other"
        request_id = scope[REQUEST_ID] = secrets.token_hex(8)

        async def sent(message: Message) -> None:
            nonlocal status, is_whole
            is_whole = message["type"] == "http.response.body" and not message.get("more_body")
            if message["type"] == "http.response.start":
                status = message["status"]
                ids = [(name, request_id.encode()) for name in ID_HEADERS[dialect_of(scope)]]
                message = {**message, "headers": [*message["headers"], *ids]}
            if is_whole:  # before it goes out: who has the answer finds it counted
                self._metrics.requests.labels(path, str(status)).inc()
            await send(message)

        try:
            scope[KEY] = self._check(scope)
            body = await self._body(scope, receive)
            await self._app(scope, _replay(body, receive), sent)
        except ApiError as error:
            if not status:
                await _answer(error, dialect_of(scope), sent)
        except asyncio.CancelledError:  # the server stops; answers that have begun end by themselves
            if status:
                raise
            await _answer(STOPPING, dialect_of(scope), sent)
        except RecursionError:
            if status:
                raise
            await _answer(ApiError(400, "the body is nested too deeply"), dialect_of(scope), sent)
        except Exception:  # whatever it is, the client gets an answer and the log the reason
            log.exception("request %s failed", request_id)
            if status and not is_whole:
                raise
            if not status:
                await _answer(failure(scope), dialect_of(scope), sent)
        finally:
            if not is_whole:
                self._metrics.requests.labels(path, str(status)).inc()
            took_ms = 1000 * (time.monotonic() - begun)
            log.info("%s %s %s %s %.1f ms", request_id, scope["method"], path, status or "gone", took_ms)

    def _check(self, scope: Scope) -> str:
        """Return a name for the key that the request has; an ``ApiError`` if it may not come in."""
        path = scope["path"]
        if not self._keys:
            self._check_host(scope)
        if not self._keys or path in OPEN_PATHS or path.startswith(OPEN_FOLDER):
            return ""
        found = _digest(_key(scope["headers"]))
        # All are compared, so that the time taken says nothing about which one was nearly right.
        if not sum(hmac.compare_digest(found, key) for key in self._keys):
            raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")
        return found.hex()

    def _check_host(self, scope: Scope) -> None:
        """Refuse the name of another site.

        A page whose name is made to lead to this machine would otherwise be let in as if it were ours.
        """
        host = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"host"), "")
        name = PORT.sub("", host).strip("[]").lower()
        if name and name != "localhost" and not _is_address(name):
            raise ApiError(403, f"the request is for {name!r}; without API keys expected localhost or an IP address")

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        headers = dict(scope["headers"])
        most = self._options.max_body_bytes
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > most:
            raise ApiError(413, f"the body has {int(length)} bytes; expected at most {most}")
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            return b""
        try:
            async with asyncio.timeout(self._options.body_timeout_s):
                body = await _read(receive, most)
        except TimeoutError:
            raise ApiError(
                408, f"the body did not come within {self._options.body_timeout_s:g} s, which is the limit"
            ) from None
        kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        if body and kind != b"application/json":
            # A page of another site can send forms and plain text here without being asked, but not this type.
            raise ApiError(415, f"content-type is {kind.decode('latin-1')!r}; expected application/json")
        coding = headers.get(b"content-encoding", b"identity").strip().lower()
        if body and coding != b"identity":
            raise ApiError(415, f"content-encoding is {coding.decode('latin-1')!r}; expected a body as it is")
        return body


def read_keys(path: Path) -> list[str]:
    """The keys in a file; a ``ValueError`` for a file that is missing or has none."""
    if not path.is_file():
        raise ValueError(f"key_file is {path}; expected a file that exists")
    keys = [key for line in path.read_text(encoding="utf-8").splitlines() if (key := line.strip())]
    if not keys:
        raise ValueError(f"key_file is {path}, which holds no key; expected one on each line")
    if not all(key.isascii() for key in keys):
        raise ValueError(f"key_file is {path}, which holds a key that is not ASCII; expected ASCII")
    return keys


def dialect_of(scope: Scope) -> Dialect:
    """Whose client asks, by the path; models are asked for at one path by all, so there Anthropic's header tells."""
    path = scope["path"]
    if path.startswith(("/anthropic", "/v1/messages")):
        return "anthropic"
    is_shared = path == "/v1/models" or path.startswith("/v1/models/")
    return "anthropic" if is_shared and any(name == b"anthropic-version" for name, _ in scope["headers"]) else "openai"


def failure(scope: Scope) -> ApiError:
    """What a client is told of a mistake of ours: where its reason is written."""
    return ApiError(500, f"the server failed; its log has request {scope[REQUEST_ID]}")


async def _read(receive: Receive, most: int) -> bytes:
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ApiError(400, "the client has gone")
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > most:
            raise ApiError(413, f"the body has more than {most} bytes; expected at most so many")
        if not message.get("more_body"):
            return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Give a body that was read once more, and then what comes."""
    is_given = False

    async def again() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _key(headers: Sequence[tuple[bytes, bytes]]) -> str:
    """The key of a request: a bearer's, or Anthropic's own header."""
    for name, value in headers:
        text = value.decode("latin-1").strip()
        if name == b"x-api-key" and text:
            return text
        if name == b"authorization" and text.lower().startswith("bearer "):
            return text[len("bearer ") :].strip()
    return ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _digest(key: str) -> bytes:
    return sha256(key.encode("latin-1", "replace")).digest()


async def _answer(error: ApiError, dialect: Dialect, send: Any) -> None:
    """Answer instead of the application.

    The connection stays: what is left of the body is read and thrown away, or a client that still sends it would not
    hear the answer. Only from a client that is slow nothing more is read.
    """
    body = dumps(error.body(dialect))
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    if error.status == 408:
        headers["connection"] = "close"
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body, "more_body": False})
