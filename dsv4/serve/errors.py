"""What a client did wrong, or a server cannot do, in the words of each protocol."""

from __future__ import annotations

from typing import Any, Literal

Dialect = Literal["openai", "anthropic"]

ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
OPENAI_TYPES = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}


class ApiError(Exception):
    """An answer with an HTTP status. code: what a program tells it by; param: the field it is about."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None, retry_after_s: int = 0
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after_s = retry_after_s

    @property
    def headers(self) -> dict[str, str]:
        headers = {"retry-after": str(self.retry_after_s)} if self.retry_after_s else {}
        return headers | ({"www-authenticate": "Bearer"} if self.status == 401 else {})

    def body(self, dialect: Dialect) -> dict[str, Any]:
        """The body as this protocol's clients parse it."""
        if dialect == "anthropic":
            kind = ANTHROPIC_TYPES.get(self.status, "api_error" if self.status >= 500 else "invalid_request_error")
            return {"type": "error", "error": {"type": kind, "message": self.message}}
        kind = OPENAI_TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def too_long(num_prompt: int, num_output: int, max_context: int) -> ApiError:
    """The context is not long enough. The words are those that clients of both protocols look for."""
    wanted = f" ({num_prompt} in the prompt, {num_output} of output)" if num_output else ""
    return ApiError(
        400,
        f"prompt is too long: {num_prompt + num_output} tokens > {max_context} maximum. This model's maximum context "
        f"length is {max_context} tokens, and the request asks for {num_prompt + num_output}{wanted}.",
        code="context_length_exceeded",
        param="messages",
    )
