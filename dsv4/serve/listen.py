"""The socket and the web server under the application."""

from __future__ import annotations

import asyncio
import socket
from types import FrameType
from typing import cast

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from dsv4.config.serve import ServeOptions

MAX_HEADER_BYTES = 2**16
BACKLOG = 1024
IDLE_S = 75.0  # a connection without a request is closed after so long
HEAD_S = 30.0  # a request's head must have come within so long, from its first byte or from the connection
TOO_LONG = f"The head of a request is longer than {MAX_HEADER_BYTES} bytes."
CUT_S = 5.0  # answers that were cut off must have ended within so long
STALL_S = 60.0  # a client that takes nothing of its answer for so long is gone


class Server(uvicorn.Server):
    """The web server. A signal stops it, which is no failure: the process goes on and ends as it likes."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit  # whoever says it twice does not want to wait
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        if self.server_state.tasks:  # answers that were cut off, whose clients are still to be told
            await asyncio.wait(self.server_state.tasks, timeout=CUT_S)


class Protocol(HttpToolsProtocol):
    """One connection. Clients that send the head of a request too slowly, or do not take an answer, are cut off.

    Heads are short: the bytes of one that has not ended are counted, and the lines of one that has. A client that
    closes its side has gone, though it might still read: half a connection cannot be told from none.
    """

    _head: asyncio.TimerHandle | None = None
    _stall: asyncio.TimerHandle | None = None
    _is_in_head = False
    _num_head = _num_lines = 0  # bytes of a head that has not ended, and of its lines so far

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(cast("asyncio.Transport", transport))
        self.transport.set_write_buffer_limits(high=0)  # so that whatever the client does not take is noticed
        self._head = self.loop.call_later(HEAD_S, self.transport.abort)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        is_between = self.cycle is None or self.cycle.response_complete
        self._num_head = self._num_head + len(data) if self._is_in_head else 0
        if self._num_head > MAX_HEADER_BYTES and not self.transport.is_closing():
            self.send_400_response(TOO_LONG)
        if is_between and self._head is None:
            self._head = self.loop.call_later(HEAD_S, self.transport.abort)
        elif not is_between and self._head is not None:
            self._head.cancel()
            self._head = None

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_in_head, self._num_lines = True, 0

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self._is_in_head = False

    def on_url(self, url: bytes) -> None:
        self._count(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(name + value)
        super().on_header(name, value)

    def _count(self, line: bytes) -> None:
        self._num_lines += len(line)
        if self._num_lines > MAX_HEADER_BYTES:
            raise ValueError(TOO_LONG)  # which the parser passes on as a bad request

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch()

    def resume_writing(self) -> None:
        super().resume_writing()
        _stop(self._stall)

    def connection_lost(self, exc: Exception | None) -> None:
        _stop(self._head)
        _stop(self._stall)
        super().connection_lost(exc)

    def _watch(self, before: int | None = None) -> None:
        """Cut the connection off if the client has taken nothing since there were so many bytes for it."""
        now = self.transport.get_write_buffer_size()
        if before is not None and now >= before:
            self.transport.abort()
        else:
            self._stall = self.loop.call_later(STALL_S, self._watch, now)


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that listens; an ``OSError`` says that the address cannot be had, before any model is loaded."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise OSError(f"cannot listen at {host}, port {port}: {error.strerror}") from error


def settings(app: ASGIApp, options: ServeOptions) -> uvicorn.Config:
    """How the web server runs: no access log of its own, and answers may end when it is stopped."""
    return uvicorn.Config(
        app, lifespan="on", access_log=False, log_level="warning", server_header=False, ws="none",
        timeout_keep_alive=round(IDLE_S), timeout_graceful_shutdown=round(options.shutdown_s) or 1,
        http=Protocol,
    )  # fmt: skip


def _stop(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
