"""What ``/openapi.json`` says of answers: which fields they have at least, that they may be events, and of errors."""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]
Documented = dict[int | str, Json]

ERROR: Json = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type"],
            "properties": {
                "message": {"type": "string", "minLength": 1},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
"""Of every protocol; Anthropic's says ``"type": "error"`` beside it."""


def _error(description: str) -> Json:
    return {"description": description, "content": {"application/json": {"schema": ERROR}}}


ERRORS: Documented = {
    "4XX": _error(
        "What is wrong with the request: 401 for the key, 404 for a name, 413 for a size, 415 for what is not JSON, "
        "429 with retry-after when there is no place, 400 for the rest."
    ),
    "5XX": _error("The server failed (500), is stopping (503), or has taken too long (504)."),
}


def whole(*fields: str) -> Documented:
    """An answer that is an object with these fields."""
    schema = {"type": "object", "required": list(fields)}
    return {200: {"description": "The answer.", "content": {"application/json": {"schema": schema}}}}


def events(*fields: str) -> Documented:
    """An answer that is an object with these fields, or comes as events if ``stream`` is true."""
    found = whole(*fields)
    found[200]["description"] = "The answer; with stream, as server-sent events."
    found[200]["content"]["text/event-stream"] = {"schema": {"type": "string"}}
    return found


CHAT = events("id", "object", "created", "model", "choices", "usage")
COMPLETION = CHAT
MESSAGE = events("id", "type", "role", "model", "content", "stop_reason", "stop_sequence", "usage")
TOKENS = whole("input_tokens")
RESPONSE = events("id", "object", "created_at", "status", "model", "output", "error")
BACKGROUND = whole("id", "object", "created_at", "status", "model", "output", "error")
DELETED = whole("id", "object", "deleted")
METRICS: Documented = {
    200: {"description": "For Prometheus.", "content": {"text/plain": {"schema": {"type": "string"}}}},
}
