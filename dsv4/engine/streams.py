"""Requests of the tasks of one event loop: each gets its pieces as they come, from steps that all of them share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, TypeVar

from dsv4.engine.outputs import Piece

if TYPE_CHECKING:
    from dsv4.engine.engine import Engine

Result = TypeVar("Result")

AT_ONCE = 2  # pieces that are handed out before other tasks have their turn


class StepError(RuntimeError):
    """Steps have stopped under a stream; the cause says why."""


class Streams:
    """The streams of an engine, and the thread in which its steps run for them."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._queues: dict[str, asyncio.Queue[Piece | asyncio.Task[None]]] = {}  # pieces, and a driver that has ended
        self._left: list[str] = []  # requests whose streams were left, until the engine has forgotten them
        self._loop: asyncio.AbstractEventLoop | None = None
        self._loop_lock = asyncio.Lock()
        self._driver: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1)

    @property
    def _lock(self) -> asyncio.Lock:
        """Between the thread's steps and the loop's calls. A lock is bound to a loop; each has one of its own."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._loop, self._loop_lock = loop, asyncio.Lock()
        return self._loop_lock

    async def run(self, add: Callable[[], str], *, is_kept: bool = False) -> AsyncGenerator[Piece, None]:
        """Yield the pieces of the request that ``add`` adds.

        Leaving the loop, early or not, drops it; one that is kept goes on, and waits to be taken.
        """
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
            if not is_kept:
                self._left.append(id)
            if not self._loop_lock.locked():  # otherwise a step is under way, and the driver does it after that
                self._drop_left()

    def _drop_left(self) -> None:
        """Let the engine forget those whose streams were left. It must stand still."""
        while self._left:
            self._engine.drop(self._left.pop())

    async def between(self, call: Callable[[], Result]) -> Result:
        """Return what ``call`` returns, which no step runs beside."""
        async with self._lock:
            return call()

    def put(self, piece: Piece) -> None:
        """Hand a piece to its stream, if it has one."""
        if piece.id in self._queues:
            self._queues[piece.id].put_nowait(piece)

    def close(self) -> None:
        """End the thread. A driver that still runs, for requests that are kept, ends with the step under way."""
        if self._driver is not None and not self._driver.done() and not self._driver.get_loop().is_closed():
            self._driver.cancel()
        self._thread.shutdown()

    async def _drive(self) -> None:
        """Step while anything runs, and hand out the pieces of one step while the next one runs."""
        pieces: list[Piece] = []
        while pieces or not self._engine.is_idle:
            async with self._lock:
                step = None if self._engine.is_idle else self._thread.submit(self._engine.step)
                try:
                    await self._hand_out(pieces)
                    pieces = [] if step is None else await asyncio.wrap_future(step)
                finally:
                    if step is not None:
                        wait([step])  # it runs on if this task is cancelled
                    self._drop_left()

    async def _hand_out(self, pieces: Sequence[Piece]) -> None:
        """Hand out a few at a time, so that whatever else comes in need not wait until many have been sent."""
        for begin in range(0, len(pieces), AT_ONCE):
            for piece in pieces[begin : begin + AT_ONCE]:
                self.put(piece)
            await asyncio.sleep(0)

    def _tell_end(self, driver: asyncio.Task[None]) -> None:
        """Let those know that still wait, however the driver has ended."""
        for queue in self._queues.values():
            queue.put_nowait(driver)


def _reason(driver: asyncio.Task[None]) -> BaseException | None:
    """Why a task has ended."""
    return asyncio.CancelledError() if driver.cancelled() else driver.exception()
