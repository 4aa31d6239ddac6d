"""Answers that take a while: JSON that is still being made, and events as they come.

Both send something when there has been silence for a time, so that no proxy and no client gives up, and both stop the
work when the client has gone. What is wrong before the first byte has a status of its own; after it, events say it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from dsv4.serve.errors import ApiError, Dialect

Json = Mapping[str, Any]
Result = TypeVar("Result")
JSON = {"content-type": "application/json"}
EVENT_STREAM = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-store",
    "x-accel-buffering": "no",  # or nginx would keep events until it has many
}
STOPPING = ApiError(503, "the server is stopping", code="server_stopping")


PLAIN = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
ESCAPED = json.JSONEncoder(allow_nan=False, separators=(",", ":"))


def dumps(value: object) -> bytes:
    """JSON as it goes over the wire: UTF-8, no spaces, and no NaN. A lone surrogate is escaped."""
    try:
        return PLAIN.encode(value).encode()
    except UnicodeEncodeError:
        return ESCAPED.encode(value).encode()


def event(data: Json, name: str | None = None) -> bytes:
    """One server-sent event."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + dumps(data) + b"\n\n"


class Later(Response):
    """JSON that ``make`` is making. Silence is broken with line breaks, which JSON allows before it."""

    def __init__(self, make: Callable[[], Awaitable[Json]], *, dialect: Dialect, keep_alive_s: float, limit_s: float):
        super().__init__()
        self._make, self._keep_alive_s, self._limit_s = make, keep_alive_s, limit_s
        self._dialect: Dialect = dialect

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.ensure_future(_limited(self._make(), self._limit_s))
        gone = asyncio.ensure_future(_gone(receive))
        is_begun = False
        try:
            while not work.done():
                await asyncio.wait({work, gone}, timeout=self._keep_alive_s, return_when=asyncio.FIRST_COMPLETED)
                if gone.done():
                    return
                if not work.done():
                    if not is_begun:
                        await _start(send, 200, JSON)
                        is_begun = True
                    await _send(send, b"\n")
            try:
                body = dumps(work.result())
            except ApiError as error:
                await self._fail(send, error, is_begun=is_begun)
                return
            if not is_begun:
                await _start(send, 200, JSON)
            await _send(send, body, is_last=True)
        except asyncio.CancelledError:  # the server has waited long enough for the end
            await self._fail(send, STOPPING, is_begun=is_begun)
        finally:
            await _cancel(work, gone)

    async def _fail(self, send: Send, error: ApiError, *, is_begun: bool) -> None:
        if not is_begun:
            await _start(send, error.status, error.headers | JSON)
        await _send(send, dumps(error.body(self._dialect)), is_last=True)


class Events(Response):
    """Server-sent events from ``source``. An ``ApiError`` before the first is an answer with its status.

    Nothing is taken from ``source`` before the client has taken what there was. silence: what breaks it; failed: the
    event that tells an error after the first.
    """

    def __init__(
        self,
        source: AsyncGenerator[bytes, None],
        *,
        dialect: Dialect,
        keep_alive_s: float,
        limit_s: float,
        failed: Callable[[ApiError], bytes],
        silence: bytes = b": keep-alive\n\n",
    ) -> None:
        super().__init__()
        self._source, self._failed, self._silence = source, failed, silence
        self._dialect: Dialect = dialect
        self._keep_alive_s, self._limit_s = keep_alive_s, limit_s
        self._turn = asyncio.Lock()  # one sends at a time
        self._num_sent = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.ensure_future(_limited(self._send_all(send), self._limit_s))
        gone = asyncio.ensure_future(_gone(receive))
        try:
            while not work.done():
                before = self._num_sent
                await asyncio.wait({work, gone}, timeout=self._keep_alive_s, return_when=asyncio.FIRST_COMPLETED)
                if gone.done():
                    return
                if not work.done() and self._num_sent == before and not self._turn.locked():
                    await self._put(send, self._silence)
            await self._end(send, work)
        except asyncio.CancelledError:  # the server has waited long enough for the end
            await _cancel(work)
            await self._fail(send, STOPPING)
        finally:
            await _cancel(work, gone)

    async def _send_all(self, send: Send) -> None:
        async with aclosing(self._source) as source:
            async for chunk in source:
                if chunk:
                    await self._put(send, chunk)

    async def _put(self, send: Send, chunk: bytes, *, is_last: bool = False) -> None:
        async with self._turn:
            if not self._num_sent:
                await _start(send, 200, EVENT_STREAM)
            self._num_sent += 1
            await _send(send, chunk, is_last=is_last)

    async def _end(self, send: Send, work: asyncio.Future[None]) -> None:
        try:
            work.result()
        except ApiError as error:
            await self._fail(send, error)
        else:
            await self._put(send, b"", is_last=True)

    async def _fail(self, send: Send, error: ApiError) -> None:
        if self._num_sent:
            await _send(send, self._failed(error), is_last=True)
        else:
            await _start(send, error.status, error.headers | JSON)
            await _send(send, dumps(error.body(self._dialect)), is_last=True)


async def _limited(work: Awaitable[Result], seconds: float) -> Result:
    try:
        async with asyncio.timeout(seconds):
            return await work
    except TimeoutError as error:
        limit = f"the request took longer than {seconds:g} s, which is the limit"
        raise ApiError(504, limit, code="timeout") from error


async def _gone(receive: Receive) -> None:
    """Return when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _start(send: Send, status: int, headers: Mapping[str, str]) -> None:
    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})


async def _send(send: Send, body: bytes, *, is_last: bool = False) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": not is_last})


async def _cancel(*tasks: asyncio.Future[Any]) -> None:
    """End tasks that are not wanted any more, and wait until they have."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
