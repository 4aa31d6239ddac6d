"""``/responses``: OpenAI's newer protocol, which Codex speaks. Its thinking is an item of the output.

Nothing is kept between requests, but for those that are answered in the background (``background.py``).
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any

from dsv4.serve.errors import ApiError
from dsv4.serve.models import thinks
from dsv4.serve.respond import event
from dsv4.serve.responses_output import Output
from dsv4.serve.responses_request import ResponsesRequest, custom_tools, turn_of
from dsv4.serve.service import Prepared, Service
from dsv4.serve.turn import Ended, Told, Turn, Usage

Json = dict[str, Any]

ERROR_CODES = {400: "invalid_prompt", 429: "rate_limit_exceeded"}


def asked_turn(request: ResponsesRequest) -> Turn:
    """The turn of a request; whether it thinks by default depends on the model's name."""
    return turn_of(request, thinks_by_default=thinks(request.model))


class ResponsesAnswer:
    """The answer to one request, whole or as it comes."""

    def __init__(
        self, service: Service, request: ResponsesRequest, prepared: Prepared, *, key: str, id: str, created: int
    ) -> None:
        self._service, self._request, self._prepared, self._key = service, request, prepared, key
        service.admission.check(key)
        self._id, self._created = id, created
        self._output, self._usage = Output(custom_tools(request)), Usage()
        self._num_events = 0

    def _response(self, status: str, **fields: Any) -> Json:
        return response_of(self._request, id=self._id, created=self._created, status=status, **fields)

    async def whole(self) -> Json:
        """The answer as one object."""
        told = [one async for news in self._service.answer(self._prepared, self._key) for one in news]
        return whole_response(self._request, told, id=self._id, created=self._created)

    async def chunks(self) -> AsyncIterator[bytes]:
        """The answer as server-sent events."""
        begun = self._response("in_progress")
        yield self._event({"type": "response.created", "response": begun})
        yield self._event({"type": "response.in_progress", "response": begun})
        async for news in self._service.answer(self._prepared, self._key):
            yield b"".join(chunk for told in news for chunk in self._chunks(told))

    def _chunks(self, told: Told) -> Iterator[bytes]:
        """Yield the events of what is told."""
        for one in self._output.tell(told):
            yield self._event(one)
        if isinstance(told, Ended):
            status = "incomplete" if told.reason == "length" else "completed"
            for one in self._output.close(status):
                yield self._event(one)
            response = self._response(status, output=self._output.items, usage=told.usage)
            yield self._event({"type": f"response.{status}", "response": response})

    def failed(self, error: ApiError) -> bytes:
        """The event that tells what went wrong after the first."""
        for _ in self._output.close("incomplete"):
            pass
        response = self._response("failed", output=self._output.items, error=error)
        return self._event({"type": "response.failed", "response": response})

    def _event(self, data: Json) -> bytes:
        self._num_events += 1
        return event({**data, "sequence_number": self._num_events - 1}, data["type"])


def whole_response(
    request: ResponsesRequest, told: Iterable[Told], *, id: str, created: int, is_cancelled: bool = False
) -> Json:
    """The response to a request of whose answer all was told."""
    output, ended = Output(custom_tools(request)), Ended("stop", Usage())
    for one in told:
        for _ in output.tell(one):
            pass
        if isinstance(one, Ended):
            ended = one
    status = "incomplete" if ended.reason == "length" else "completed"
    for _ in output.close(status):
        pass
    if is_cancelled:
        status = "cancelled"
    return response_of(request, id=id, created=created, status=status, output=output.items, usage=ended.usage)


def response_of(
    request: ResponsesRequest,
    *,
    id: str,
    created: int,
    status: str,
    output: Iterable[Json] = (),
    usage: Usage | None = None,
    error: ApiError | None = None,
) -> Json:
    """A response object: what was asked, and what has come of it."""
    asked = request.model_dump(mode="json", by_alias=True, exclude_unset=True)
    choice = request.tool_choice
    return {
        "id": id, "object": "response", "created_at": created, "status": status, "model": request.model,
        "background": bool(request.background), "store": bool(request.background),
        "completed_at": int(time.time()) if status == "completed" else None,
        "error": None if error is None else _error(error),
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "output": list(output), "usage": None if usage is None else usage_of(usage),
        "instructions": request.instructions, "previous_response_id": None,
        "tools": asked.get("tools") or [], "tool_choice": "auto" if choice is None else choice.echo,
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "reasoning": {"effort": None, "summary": None, **(asked.get("reasoning") or {})},
        "text": {"format": {"type": "text"}} | {k: v for k, v in (asked.get("text") or {}).items() if v is not None},
        "max_output_tokens": request.max_output_tokens, "temperature": request.temperature, "top_p": request.top_p,
        "metadata": request.metadata or {}, "user": request.user, "safety_identifier": request.safety_identifier,
        "prompt_cache_key": request.prompt_cache_key, "truncation": "disabled",
    }  # fmt: skip


def usage_of(usage: Usage) -> Json:
    """Tokens as this protocol counts them; what is written to the cache costs nothing, and is not counted."""
    return {
        "input_tokens": usage.num_prompt,
        "input_tokens_details": {"cached_tokens": usage.num_cached, "cache_write_tokens": 0},
        "output_tokens": usage.num_output,
        "output_tokens_details": {"reasoning_tokens": usage.num_reasoning},
        "total_tokens": usage.num_prompt + usage.num_output,
    }


def _error(error: ApiError) -> Json:
    return {"code": ERROR_CODES.get(error.status, "server_error"), "message": error.message}
