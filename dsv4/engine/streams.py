"""Requests of the tasks of one event loop: each gets its pieces as they come, from steps that all of them share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TYPE_CHECKING

from dsv4.engine.outputs import Piece

if TYPE_CHECKING:
    from dsv4.engine.engine import Engine


class StepError(RuntimeError):
    """Steps have stopped under a stream; the cause says why."""


class Streams:
    """The streams of an engine, and the thread in which its steps run for them."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._queues: dict[str, asyncio.Queue[Piece | asyncio.Task[None]]] = {}  # pieces, and a driver that has ended
        self._lock = asyncio.Lock()  # between the thread's steps and the loop's calls
        self._driver: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1)

    async def run(self, add: Callable[[], str]) -> AsyncIterator[Piece]:
        """Yield the pieces of the request that ``add`` adds. Leaving the loop early cancels it."""
        queue: asyncio.Queue[Piece | asyncio.Task[None]] = asyncio.Queue()
        async with self._lock:
            id = add()
        self._queues[id] = queue
        if self._driver is None or self._driver.done():
            self._driver = asyncio.create_task(self._drive())
            self._driver.add_done_callback(self._tell_end)
        driver = self._driver
        try:
            while True:
                found = await queue.get()
                if found is driver:
                    raise StepError(f"request {id}: the engine's steps have stopped") from _reason(driver)
                if isinstance(found, Piece):  # else a driver that had ended before this stream began
                    yield found
                    if found.finish is not None:
                        return
        finally:
            del self._queues[id]
            async with self._lock:
                self._engine.drop(id)

    def put(self, piece: Piece) -> None:
        """Hand a piece to its stream, if it has one."""
        if piece.id in self._queues:
            self._queues[piece.id].put_nowait(piece)

    def close(self) -> None:
        self._thread.shutdown()

    async def _drive(self) -> None:
        """Step while anything runs, and hand out the pieces."""
        while not self._engine.is_idle:
            async with self._lock:
                step = self._thread.submit(self._engine.step)
                try:
                    pieces = await asyncio.wrap_future(step)
                finally:
                    wait([step])  # it runs on if this task is cancelled
            for piece in pieces:
                self.put(piece)
            await asyncio.sleep(0)

    def _tell_end(self, driver: asyncio.Task[None]) -> None:
        """Let those know that still wait, however the driver has ended."""
        for queue in self._queues.values():
            queue.put_nowait(driver)


def _reason(driver: asyncio.Task[None]) -> BaseException | None:
    """Why a task has ended."""
    return asyncio.CancelledError() if driver.cancelled() else driver.exception()
