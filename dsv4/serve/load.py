"""A client that only measures: streams of one HTTP server, in a process of its own, at as little cost as can be."""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, NamedTuple
from urllib.parse import urlsplit

READ_BYTES = 2**16


class Timing(NamedTuple):
    """Of one request, in seconds from its beginning."""

    first_s: float
    last_s: float


class Measured(NamedTuple):
    """Of requests that ran at once. seconds: from the first beginning to the last end."""

    timings: list[Timing]
    seconds: float


async def measure(works: Sequence[Callable[[], AsyncIterator[object]]]) -> Measured:
    """Run several streams at once and time what they yield."""

    async def timed(work: Callable[[], AsyncIterator[object]]) -> Timing:
        begun, first = time.perf_counter(), 0.0
        async for _ in work():
            first = first or time.perf_counter()
        return Timing(first - begun, time.perf_counter() - begun)

    begun = time.perf_counter()
    timings = await asyncio.gather(*(timed(work) for work in works))
    return Measured(list(timings), time.perf_counter() - begun)


async def events(address: str, path: str, body: bytes) -> AsyncIterator[bytes]:
    """Yield the content of a chat stream as it comes in, several events at once if they do; raise if it is refused."""
    parts = urlsplit(address)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        head = (
            f"POST {path} HTTP/1.1\r\nhost: {parts.netloc}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        writer.write(head.encode() + body)
        await writer.drain()
        answer = await reader.readuntil(b"\r\n\r\n")
        if not answer.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"{answer.splitlines()[0].decode()}: {(await reader.read()).decode()}")
        while part := await reader.read(READ_BYTES):
            if b'"delta":{"content"' in part:  # not what begins or ends a stream
                yield part
    finally:
        writer.close()
        await writer.wait_closed()


class Client:
    """A process that sends requests when it is told to, and says how long they took."""

    def __init__(self, address: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(address, theirs), daemon=True)
        self._process.start()

    async def measure(self, path: str, bodies: Sequence[bytes]) -> Measured:
        """Send all at once."""
        self._ours.send((path, list(bodies)))
        while not self._ours.poll():
            if not self._process.is_alive():
                raise RuntimeError("the measuring client has ended; its error is above")
            await asyncio.sleep(0.02)
        return self._ours.recv()

    def close(self) -> None:
        self._ours.send(None)
        self._process.join()


def _serve(address: str, pipe: multiprocessing.connection.Connection) -> None:  # pyright: ignore
    while (wanted := pipe.recv()) is not None:
        path, bodies = wanted
        pipe.send(asyncio.run(_all(address, path, bodies)))


def _all(address: str, path: str, bodies: list[bytes]) -> Coroutine[Any, Any, Measured]:
    return measure([lambda body=body: events(address, path, body) for body in bodies])
