"""What the one model of a server is called, by itself and by clients that only know names of the hosted ones."""

from __future__ import annotations

from typing import Any

from dsv4.serve.errors import ApiError
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


def thinks(name: str) -> bool:
    """Whether a model of this name thinks if a request does not say."""
    return name != NOT_THINKING


def model_list(service: Service) -> dict[str, Any]:
    """The models, as OpenAI's clients read them, and once more as Codex does."""
    found = _described(service, service.name)
    return {"object": "list", "data": [found], "models": [found]}


def one_model(service: Service, name: str) -> dict[str, Any]:
    check_model(service, name)
    return _described(service, name)


def _described(service: Service, name: str) -> dict[str, Any]:
    length = service.max_context
    return {
        "id": name, "object": "model", "created": service.created, "owned_by": "dsv4", "context_length": length,
        "max_model_len": length, "max_output_tokens": length, "slug": name, "display_name": name,
    }  # fmt: skip
