"""Responses that are made in the background: asked for now, fetched later, and not lost when the server dies.

A record on the disk says what was asked, and the engine's log has every token of the answer. The engine's request has
the id of the response, and is forgotten only when the record has the end: after a kill at any moment, what is there
says what is left to do. Records are only for the API key that they were made with.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dsv4.config.sampling import MAX_SEED
from dsv4.engine.log import recover
from dsv4.engine.outputs import Completion, Piece
from dsv4.serve.answer import AnswerReader
from dsv4.serve.errors import ApiError
from dsv4.serve.responses import asked_turn, response_of, whole_response
from dsv4.serve.responses_records import Record, Records
from dsv4.serve.responses_request import ResponsesRequest
from dsv4.serve.service import Prepared, Service, salt_of
from dsv4.serve.turn import Ended, Told

Json = dict[str, Any]
Add = Callable[[], str]

log = logging.getLogger("dsv4.serve")


@dataclass(kw_only=True)
class _Run:
    """A response that is being made. response: what came of it."""

    record: Record
    request: ResponsesRequest
    prepared: Prepared
    status: str = "queued"
    response: Json | None = None
    task: asyncio.Task[None] | None = None

    @property
    def now(self) -> Json:
        record = self.record
        return self.response or response_of(self.request, id=record.id, created=record.created, status=self.status)


class Background:
    """The background responses of a service, in its folder for state; without one, none can be had."""

    def __init__(self, service: Service) -> None:
        state = service.options.state
        if state is not None and service.engine.limits.log is None:
            raise ValueError(f"serve.state is {state!r}, but the engine has no log; expected limits.log in that folder")
        self._service, self._engine = service, service.engine
        self._records = None if state is None else Records(Path(state) / "responses")
        self._runs: dict[str, _Run] = {}

    # ---- from start to stop of a server ----

    async def start(self) -> None:
        """Go on with what an earlier server left. What else its log has is forgotten: who asked for that has gone."""
        path = self._engine.limits.log
        if path is None:
            return
        runs = {}
        for record in [] if self._records is None else self._records.unfinished():
            run = await self._found(record)
            if run is not None:
                runs[record.id] = run
        masked = [one.id for one in recover(path) if one.has_mask and one.finish is None]
        masks = {id: (runs[id].prepared.mask if id in runs else None) or _anything for id in masked}
        ids = set(self._engine.resume(masks))
        for id in ids - runs.keys():
            self._engine.drop(id)
        for id, run in runs.items():  # all of them listen before the first step is made
            has_ended = id in ids and self._engine.completion(id).finish is not None
            add = None if has_ended else self._known(id) if id in ids else self._new(run)
            self._begin(run, add)

    async def _found(self, record: Record) -> _Run | None:
        """A record that has not ended, ready to run; if that is not possible any more, it is stored as failed."""
        assert self._records is not None, "there are no records; expected a folder"
        try:
            request = ResponsesRequest.model_validate(record.request)
            return self._run_of(record, request, await self._service.prepare(asked_turn(request)))
        except (ApiError, ValidationError) as error:
            log.warning("response %s cannot be gone on with: %s", record.id, error)
            self._records.write(replace(record, response=_lost(record, str(error))))
            return None

    async def stop(self) -> None:
        """Leave what runs as it is, for the next start."""
        tasks = [run.task for run in self._runs.values() if run.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # ---- what clients ask for ----

    async def add(self, request: ResponsesRequest, *, key: str, id: str, created: int) -> Json:
        """Take a request; return its response as it is now. It goes on when the client has gone."""
        records = self._records
        if records is None:
            raise ApiError(
                400, "background is true, but this server has no folder for it; expected one started with --state",
                param="background",
            )  # fmt: skip
        if request.stream:
            raise ApiError(400, "background is true with stream; expected one of them", param="stream")
        if request.store is False:
            raise ApiError(
                400, "store is false with background; expected true: the response waits to be fetched", param="store"
            )
        prepared = await self._service.prepare(asked_turn(request))
        self._service.admission.check(key)
        seed = prepared.sampling.seed
        record = Record(
            id=id, key=key, created=created, prompt_ids=prepared.prompt_ids,
            request=request.model_dump(mode="json", by_alias=True, exclude_unset=True),
            seed=secrets.randbelow(MAX_SEED) if seed is None else seed,
        )  # fmt: skip
        await asyncio.to_thread(records.write, record)
        run = self._run_of(record, request, prepared)
        self._begin(run, self._new(run))
        await asyncio.to_thread(records.prune, frozenset(self._runs))
        return run.now

    async def get(self, id: str, key: str) -> Json:
        """A response as it is now; an ``ApiError`` of 404 if there is none of this id and key."""
        run = self._runs.get(id)
        if run is not None and run.record.key == key:
            return run.now
        record = None
        if run is None and self._records is not None:
            record = await asyncio.to_thread(self._records.read, id)
        if record is None or record.key != key or record.response is None:
            raise ApiError(
                404, f"there is no response {id!r}; expected the id of one that was asked for with background",
                code="not_found",
            )  # fmt: skip
        return record.response

    async def cancel(self, id: str, key: str) -> Json:
        """End a response, and return it; one that has ended stays as it is."""
        found, run = await self.get(id, key), self._runs.get(id)
        if run is None or run.task is None:
            return found
        await self._engine.between(lambda: self._engine.cancel(id))
        await asyncio.wait([run.task])
        return run.now

    async def delete(self, id: str, key: str) -> Json:
        """End a response and forget it."""
        await self.cancel(id, key)
        assert self._records is not None, "there are no records; expected a folder"
        await asyncio.to_thread(self._records.remove, id)
        if self._runs.pop(id, None) is not None:  # its end could not be stored
            await self._engine.between(lambda: self._engine.drop(id))
        return {"id": id, "object": "response", "deleted": True}

    # ---- one response ----

    def _run_of(self, record: Record, request: ResponsesRequest, prepared: Prepared) -> _Run:
        """A run with the prompt and the seed that the record has, whatever they would be now."""
        sampling = replace(prepared.sampling, seed=record.seed)
        prepared = replace(prepared, prompt_ids=record.prompt_ids, sampling=sampling)
        return _Run(record=record, request=request, prepared=prepared)

    def _new(self, run: _Run) -> Add:
        prepared = run.prepared
        return lambda: self._engine.add(
            prepared.prompt_ids, prepared.sampling, id=run.record.id, salt=salt_of(prepared.turn.user),
            mask=prepared.mask,
        )  # fmt: skip

    def _known(self, id: str) -> Add:
        return lambda: id

    def _begin(self, run: _Run, add: Add | None) -> None:
        self._runs[run.record.id] = run
        run.task = asyncio.create_task(self._run(run, add))

    async def _run(self, run: _Run, add: Add | None) -> None:
        """Make a response, store it, and only then let the engine forget it. add: None if it has ended."""
        id, created = run.record.id, run.record.created
        assert self._records is not None, "there are no records; expected a folder"
        try:
            if add is not None:
                async for piece in self._service.follow(add, run.record.key):
                    run.status = "in_progress" if piece.token_ids else run.status
            response = await self._response(run, self._engine.completion(id))
        except ApiError as error:
            response = response_of(run.request, id=id, created=created, status="failed", error=error)
        except OSError as error:
            told = ApiError(500, f"the log cannot be written: {error}")
            response = response_of(run.request, id=id, created=created, status="failed", error=told)
        try:
            await asyncio.to_thread(self._records.write, replace(run.record, response=response))
        except OSError as error:
            log.warning("response %s cannot be stored: %s; it is kept in memory, and the engine's log", id, error)
            run.response = response
            return
        run.response = response  # not before it is stored: another start would give its items other ids
        await self._engine.between(lambda: self._engine.drop(id))
        del self._runs[id]

    async def _response(self, run: _Run, completion: Completion) -> Json:
        if completion.error is not None:
            raise ApiError(500, f"no token can follow: {completion.error}", code="no_token")
        told, reader = await asyncio.to_thread(self._told, run.prepared, completion)
        ended = told[-1]
        if isinstance(ended, Ended):
            self._service.note(ended)
        self._service.memory.keep(run.prepared.turn.user, reader.call_ids, reader.reasoning)
        return whole_response(
            run.request, told, id=run.record.id, created=run.record.created,
            is_cancelled=completion.finish == "cancelled",
        )  # fmt: skip

    def _told(self, prepared: Prepared, completion: Completion) -> tuple[Sequence[Told], AnswerReader]:
        """All that is told of an answer, out of its tokens."""
        reader = self._service.reader(prepared)
        whole = Piece(
            id=completion.id, token_ids=tuple(completion.token_ids), text="",
            finish="stop" if completion.finish == "stop" else "length",
        )  # fmt: skip
        return reader.read(whole, completion.num_cached), reader


def _anything(_: Sequence[int]) -> None:
    """The mask of a request that is dropped."""


def _lost(record: Record, reason: str) -> Json:
    """The response of a record whose request is not understood any more."""
    return {
        "id": record.id, "object": "response", "created_at": record.created, "status": "failed", "background": True,
        "model": record.request.get("model"), "output": [], "tools": [], "tool_choice": "auto",
        "parallel_tool_calls": True, "error": {"code": "server_error", "message": reason},
    }  # fmt: skip
