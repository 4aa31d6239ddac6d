"""The JSON of a request's body: UTF-8, without the numbers that JSON does not have but Python reads."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Coroutine
from json import JSONDecodeError
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.responses import Response

SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class StrictRoute(APIRoute):
    """A route whose requests are read by ``loads``."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            return await handle(_Strict(request.scope, request.receive))

        return handle_strictly


class _Strict(Request):
    async def json(self) -> Any:
        return loads(await self.body())


def loads(body: bytes) -> Any:
    """Read JSON; a ``JSONDecodeError`` says what is wrong with it."""
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise JSONDecodeError("it is not UTF-8", "", error.start) from error
    try:
        value = json.loads(text, parse_constant=_no_number, parse_float=_finite)
        if SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except JSONDecodeError:
        raise
    except UnicodeEncodeError as error:  # no tokenizer, and hardly any program, could read it
        raise JSONDecodeError("a text has half of a surrogate pair; expected whole characters", "", 0) from error
    except ValueError as error:  # Python reads no number of more than 4300 digits
        raise JSONDecodeError("a number has too many digits", "", 0) from error
    except RecursionError as error:
        raise JSONDecodeError("it is nested too deeply", "", 0) from error


def _no_number(name: str) -> Any:
    raise JSONDecodeError(f"{name} is no number in JSON", name, 0)


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise JSONDecodeError("a number is too large", text, 0)
    return value
