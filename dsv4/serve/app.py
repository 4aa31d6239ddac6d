"""The application: which path leads where. Handlers check, and leave the work to the answers of their protocol."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import Field
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from dsv4.config.serve import ServeOptions
from dsv4.serve import openapi
from dsv4.serve.background import Background
from dsv4.serve.body import StrictRoute
from dsv4.serve.chat_completions import ChatAnswer, ChatRequest, turn_of
from dsv4.serve.completions import CompletionAnswer, CompletionRequest
from dsv4.serve.errors import ApiError
from dsv4.serve.guard import KEY, Guard, dialect_of, failure
from dsv4.serve.messages import MessageAnswer, count_tokens
from dsv4.serve.messages_request import CountRequest, MessagesRequest
from dsv4.serve.messages_request import turn_of as messages_turn
from dsv4.serve.metrics import CONTENT_TYPE
from dsv4.serve.models import check_model, check_name, model_list, one_model, thinks
from dsv4.serve.page import CONTENT_SECURITY_POLICY, page_files
from dsv4.serve.respond import Events, Later, dumps
from dsv4.serve.responses import ResponsesAnswer, asked_turn
from dsv4.serve.responses_request import ResponsesRequest
from dsv4.serve.schema import Loose
from dsv4.serve.service import Service


class TokenizeRequest(Loose):
    """text, as plain text unless special tokens are meant; or messages, as a chat request has them."""

    text: str | None = None
    prompt: str | None = None
    special: bool = False


class DetokenizeRequest(Loose):
    tokens: list[Annotated[int, Field(ge=0, lt=2**31)]]


class Answered:
    """Makes responses for a service's options."""

    def __init__(self, options: ServeOptions) -> None:
        self._options = options

    def __call__(self, answer: Any, request: Request, *, stream: bool) -> Response:
        """The answer whole, or as events; both stop when the client goes."""
        dialect = dialect_of(request.scope)
        limits = {"keep_alive_s": self._options.keep_alive_s, "limit_s": self._options.request_timeout_s}
        if stream:
            silence = {"silence": answer.silence} if hasattr(answer, "silence") else {}
            return Events(answer.chunks(), dialect=dialect, failed=answer.failed, **limits, **silence)
        return Later(answer.whole, dialect=dialect, **limits)


def create_app(service: Service) -> ASGIApp:
    """Return the whole application around a service: its guard, and outside it only what browsers ask for."""
    background = Background(service)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        try:
            await background.start()
            yield
        finally:
            await background.stop()
            service.engine.close()

    app = FastAPI(
        title="dsv4", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url="/openapi.json",
        description="DeepSeek-V4, in the protocols of DeepSeek, OpenAI and Anthropic.", responses=openapi.ERRORS,
    )  # fmt: skip
    app.router.route_class = StrictRoute
    _add_errors(app)
    _add_page(app)
    _add_facts(app, service)
    _add_openai(app, service)
    _add_messages(app, service)
    _add_responses(app, service, background)
    options = service.options
    paths = frozenset(path for route in app.routes if (path := getattr(route, "path", "")) and "{" not in path)
    guard = Guard(app, options, service.metrics, paths)
    if not options.cors_origins:
        return guard
    # Outermost: browsers ask without a key whether they may ask, and must be allowed to read what the guard says.
    return CORSMiddleware(
        guard, allow_origins=options.cors_origins, allow_methods=["GET", "POST", "DELETE"], allow_headers=["*"],
        expose_headers=["retry-after", "x-request-id", "request-id"],
    )  # fmt: skip


def _add_openai(app: FastAPI, service: Service) -> None:
    answered = Answered(service.options)

    @app.post("/v1/chat/completions", responses=openapi.CHAT)
    @app.post("/chat/completions", include_in_schema=False)
    @app.post("/beta/chat/completions", include_in_schema=False)
    @app.post("/v1/beta/chat/completions", include_in_schema=False)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        check_model(service, body.model)
        prepared = await service.prepare(turn_of(body, thinks_by_default=thinks(body.model)))
        answer = ChatAnswer(
            service, body, prepared, key=request.scope[KEY], id="chatcmpl-" + secrets.token_hex(12), created=_now()
        )
        return answered(answer, request, stream=body.stream)

    @app.post("/v1/completions", responses=openapi.COMPLETION)
    @app.post("/completions", include_in_schema=False)
    @app.post("/beta/completions", include_in_schema=False)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        check_model(service, body.model)
        answer = CompletionAnswer(
            service, body, key=request.scope[KEY], id="cmpl-" + secrets.token_hex(12), created=_now()
        )
        return answered(answer, request, stream=body.stream)


def _add_messages(app: FastAPI, service: Service) -> None:
    answered = Answered(service.options)

    @app.post("/v1/messages", responses=openapi.MESSAGE)
    @app.post("/anthropic/v1/messages", include_in_schema=False)
    @app.post("/anthropic/messages", include_in_schema=False)
    async def messages(body: MessagesRequest, request: Request) -> Response:
        check_name(service, body.model)
        prepared = await service.prepare(messages_turn(body))
        answer = MessageAnswer(service, body, prepared, key=request.scope[KEY], id="msg_" + secrets.token_hex(12))
        return answered(answer, request, stream=bool(body.stream))

    @app.post("/v1/messages/count_tokens", responses=openapi.TOKENS)
    @app.post("/anthropic/v1/messages/count_tokens", include_in_schema=False)
    @app.post("/anthropic/messages/count_tokens", include_in_schema=False)
    async def count(body: CountRequest) -> dict[str, Any]:
        check_name(service, body.model)
        return count_tokens(service, body)


def _add_responses(app: FastAPI, service: Service, background: Background) -> None:
    answered = Answered(service.options)

    @app.post("/v1/responses", responses=openapi.RESPONSE)
    @app.post("/responses", include_in_schema=False)
    async def responses(body: ResponsesRequest, request: Request) -> Response:
        check_model(service, body.model)
        asked = {"key": request.scope[KEY], "id": "resp_" + secrets.token_hex(12), "created": _now()}
        if body.background:
            return Response(dumps(await background.add(body, **asked)), media_type="application/json")
        answer = ResponsesAnswer(service, body, await service.prepare(asked_turn(body)), **asked)
        return answered(answer, request, stream=bool(body.stream))

    @app.get("/v1/responses/{id}", responses=openapi.BACKGROUND)
    @app.get("/responses/{id}", include_in_schema=False)
    async def response(id: str, request: Request, stream: bool = False) -> Response:
        if stream:
            raise ApiError(400, "stream is true; expected false: a background response comes whole", param="stream")
        return Response(dumps(await background.get(id, request.scope[KEY])), media_type="application/json")

    @app.post("/v1/responses/{id}/cancel", responses=openapi.BACKGROUND)
    @app.post("/responses/{id}/cancel", include_in_schema=False)
    async def cancel_response(id: str, request: Request) -> Response:
        return Response(dumps(await background.cancel(id, request.scope[KEY])), media_type="application/json")

    @app.delete("/v1/responses/{id}", responses=openapi.DELETED)
    @app.delete("/responses/{id}", include_in_schema=False)
    async def delete_response(id: str, request: Request) -> Response:
        return Response(dumps(await background.delete(id, request.scope[KEY])), media_type="application/json")


def _add_facts(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models", responses=openapi.whole("data"))
    @app.get("/models", include_in_schema=False)
    @app.get("/anthropic/v1/models", include_in_schema=False)
    async def models(request: Request) -> dict[str, Any]:
        return model_list(service, dialect_of(request.scope))

    @app.get("/v1/models/{name}", responses=openapi.whole("id"))
    @app.get("/anthropic/v1/models/{name}", include_in_schema=False)
    async def model(name: str, request: Request) -> dict[str, Any]:
        return one_model(service, name, dialect_of(request.scope))

    @app.get("/health", responses=openapi.whole("status", "model", "requests"))
    async def health() -> dict[str, Any]:
        return {"status": "ok", "model": service.name, "requests": service.admission.num_now}

    @app.get("/metrics", response_class=Response, responses=openapi.METRICS)
    async def metrics() -> Response:
        service.metrics.running.set(service.admission.num_now)
        service.metrics.free_pages.set(service.engine.pool.num_free)
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)

    @app.post("/tokenize", responses=openapi.whole("tokens", "count", "max_model_len"))
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        text = body.text if body.text is not None else body.prompt
        if text is None:
            raise ApiError(400, "text is missing; expected a text", param="text")
        tokenizer = service.tokenizer if body.special else service.plain_tokenizer
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        return {"tokens": ids, "count": len(ids), "max_model_len": service.max_context}

    @app.post("/detokenize", responses=openapi.whole("text"))
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        size = service.engine.model.config.vocab_size
        wrong = next((token for token in body.tokens if token >= size), None)
        if wrong is not None:
            raise ApiError(400, f"tokens holds {wrong}; expected ids below {size}", param="tokens")
        text = service.tokenizer.decode(body.tokens, skip_special_tokens=False)
        return {"text": text, "prompt": text}


def _add_page(app: FastAPI) -> None:
    headers = {
        "content-security-policy": CONTENT_SECURITY_POLICY, "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer", "cache-control": "no-cache",
    }  # fmt: skip
    for path, (content, media_type) in page_files().items():
        app.add_api_route(path, _file(content, media_type, headers), include_in_schema=False)


def _file(content: bytes, media_type: str, headers: dict[str, str]) -> Any:
    async def send() -> Response:
        return Response(content, media_type=media_type, headers=headers)

    return send


def _add_errors(app: FastAPI) -> None:
    def answer(request: Request, error: ApiError) -> Response:
        body = dumps(error.body(dialect_of(request.scope)))
        return Response(body, error.status, error.headers, media_type="application/json")

    @app.exception_handler(ApiError)
    async def told(request: Request, error: ApiError) -> Response:
        return answer(request, error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return answer(request, ApiError(400, f"the body is no JSON: {first['ctx']['error']}", code="invalid_json"))
        place = ".".join(str(part) for part in first["loc"] if part != "body")
        where = f"{place}: " if place else ""
        return answer(request, ApiError(400, f"{where}{first['msg']}", code="invalid_value", param=place or None))

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        found = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
        response = answer(request, found)
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def failed(request: Request, _: Exception) -> Response:
        return answer(request, failure(request.scope))


def _now() -> int:
    return int(time.time())
