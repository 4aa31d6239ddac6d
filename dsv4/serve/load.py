"""A client that only measures: streams of one HTTP server, in a process of its own, at as little cost as can be."""

from __future__ import annotations

import asyncio
import multiprocessing
import selectors
import socket
import time
from collections.abc import AsyncIterator, Callable, Sequence
from itertools import chain
from typing import NamedTuple
from urllib.parse import urlsplit

READ_BYTES = 2**16
OK, DELTA = b"HTTP/1.1 200", b'"delta":{"content"'


class Timing(NamedTuple):
    """Of one request. begun: by ``time.perf_counter``; the others in seconds from there."""

    begun: float
    first_s: float
    last_s: float


class Measured(NamedTuple):
    """Of requests of several clients. seconds: from the first beginning to the last end; processor_s: the client's."""

    timings: list[Timing]
    seconds: float
    processor_s: float = 0.0


async def measure(plans: Sequence[Sequence[Callable[[], AsyncIterator[object]]]]) -> Measured:
    """Run plans beside each other, the streams of each one after the other, and time what they yield."""

    async def timed(plan: Sequence[Callable[[], AsyncIterator[object]]]) -> list[Timing]:
        timings = []
        for work in plan:
            begun, first = time.perf_counter(), 0.0
            async for _ in work():
                first = first or time.perf_counter()
            timings.append(Timing(begun, first - begun, time.perf_counter() - begun))
        return timings

    begun = time.perf_counter()
    found = await asyncio.gather(*map(timed, plans))
    return Measured(list(chain.from_iterable(found)), time.perf_counter() - begun)


class _Stream:
    """One chat stream: its socket, and when its tokens came."""

    def __init__(self, address: tuple[str, int], head: bytes, body: bytes) -> None:
        self.begun = time.perf_counter()
        self.first_s = self.last_s = 0.0
        self.is_open = True
        self._answer = b""
        self.socket = socket.create_connection(address)
        self.socket.sendall(head + body)
        self.socket.setblocking(False)

    def read(self) -> None:
        """Take what has come. Raises ``RuntimeError`` if the request is refused."""
        part = self.socket.recv(READ_BYTES)
        if not self.first_s:
            self._answer += part
            if not self._answer.startswith(OK[: len(self._answer)]) or (not part and DELTA not in self._answer):
                raise RuntimeError(f"expected a stream of tokens, got {self._answer.decode(errors='replace')}")
        if DELTA in part:  # not what begins or ends a stream
            self.last_s = time.perf_counter() - self.begun
            self.first_s = self.first_s or self.last_s
        self.is_open = part != b""


def run_plans(address: str, path: str, plans: Sequence[Sequence[bytes]]) -> Measured:
    """Ask for chat streams as ``measure`` runs them, of bodies. Raises ``RuntimeError`` if one is refused.

    A loop over sockets without tasks: on the cores of the server, a client's own time counts as the server's.
    """
    parts = urlsplit(address)
    begun, processor, found = time.perf_counter(), time.process_time(), [list[_Stream]() for _ in plans]
    with selectors.DefaultSelector() as ready:

        def go_on(index: int) -> None:
            if len(found[index]) < len(plans[index]):
                body = plans[index][len(found[index])]
                head = (
                    f"POST {path} HTTP/1.1\r\nhost: {parts.netloc}\r\ncontent-type: application/json\r\n"
                    f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
                )
                found[index].append(_Stream((str(parts.hostname), parts.port or 80), head.encode(), body))
                ready.register(found[index][-1].socket, selectors.EVENT_READ, index)

        for index in range(len(plans)):
            go_on(index)
        while ready.get_map():
            for key, _ in ready.select():
                stream = found[key.data][-1]
                stream.read()
                if not stream.is_open:
                    ready.unregister(stream.socket)
                    stream.socket.close()
                    go_on(key.data)
    seconds = time.perf_counter() - begun
    timings = [Timing(one.begun, one.first_s, one.last_s) for one in chain.from_iterable(found)]
    return Measured(timings, seconds, time.process_time() - processor)


class Client:
    """A process that sends requests when it is told to, and says how long they took."""

    def __init__(self, address: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(address, theirs), daemon=True)
        self._process.start()

    async def measure(self, path: str, plans: Sequence[Sequence[bytes]]) -> Measured:
        """Let it run plans of bodies."""
        self._ours.send((path, plans))
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
        pipe.send(run_plans(address, *wanted))
