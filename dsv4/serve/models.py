"""What the one model of a server is called, by itself and by clients that only know names of the hosted ones."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from dsv4.serve.errors import ApiError, Dialect
from dsv4.serve.service import Service

NOT_THINKING = "deepseek-chat"
ALIASES = (NOT_THINKING, "deepseek-reasoner", "deepseek-v4-flash", "deepseek-v4-pro", "deepseek-flash")
"""Names of the hosted models, which programs have built in; all of them are the model that is here."""


def check_model(service: Service, name: str) -> None:
    """Raise an ``ApiError`` for the name of a model that is not here."""
    if name != service.name and name not in ALIASES:
        raise ApiError(
            404, f"model is {name!r}; expected {service.name!r}, or one of {', '.join(ALIASES)}, which stand for it",
            code="model_not_found", param="model",
        )  # fmt: skip


def check_name(service: Service, name: str) -> None:
    """The same for Anthropic's clients: every ``claude`` name stands for the model that is here, too."""
    if not name.startswith("claude"):
        check_model(service, name)


def thinks(name: str) -> bool:
    """Whether a model of this name thinks if a request does not say."""
    return name != NOT_THINKING


def model_list(service: Service, dialect: Dialect) -> dict[str, Any]:
    """The models, as Anthropic's clients read them, or as OpenAI's, and then once more as Codex does."""
    if dialect == "anthropic":
        name = service.name
        return {"data": [_anthropic(service, name)], "has_more": False, "first_id": name, "last_id": name}
    found = _described(service, service.name)
    return {"object": "list", "data": [found], "models": [found]}


def one_model(service: Service, name: str, dialect: Dialect) -> dict[str, Any]:
    """A model by its name; an ``ApiError`` if it is not here."""
    if dialect == "anthropic":
        check_name(service, name)
        return _anthropic(service, name)
    check_model(service, name)
    return _described(service, name)


def _described(service: Service, name: str) -> dict[str, Any]:
    length = service.max_context
    return {
        "id": name, "object": "model", "created": service.created, "owned_by": "dsv4", "context_length": length,
        "max_model_len": length, "max_output_tokens": length, "slug": name, "display_name": name,
    }  # fmt: skip


def _anthropic(service: Service, name: str) -> dict[str, Any]:
    length = service.max_context
    return {
        "type": "model", "id": name, "display_name": name, "lifecycle": "active",
        "created_at": datetime.fromtimestamp(service.created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "max_input_tokens": length, "max_tokens": length,
    }  # fmt: skip
